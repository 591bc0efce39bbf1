import os
import re
import time

from flowhn_jax.training.health.watchdog import Watchdog


def reports(text):
    return re.findall(r"watchdog: no progress for ([\d.]+) minutes since '(.*)' began", text)


def wait_in_here(seconds):
    time.sleep(seconds)


def test_shows_where_a_run_hangs(capfd):
    with Watchdog(0.01) as watchdog:
        watchdog.progress("the step after 7")
        wait_in_here(1.5)
    text = capfd.readouterr().err
    found = reports(text)
    assert found[:2] == [("0.01", "the step after 7"), ("0.02", "the step after 7")]
    assert f"(pid {os.getpid()} on " in text
    assert "in process 0" in text
    assert "in wait_in_here" in text  # the stack of the thread that hangs


def test_is_silent_while_steps_end(capfd):
    with Watchdog(0.02) as watchdog:
        for step in range(30):
            watchdog.progress(f"the step after {step}")
            time.sleep(0.05)
    assert reports(capfd.readouterr().err) == []
