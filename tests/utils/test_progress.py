"""Progress of long work, in a pipe and in a terminal."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from flowhn_jax.utils import progress as progress_lib
from flowhn_jax.utils.progress import Progress, activity, clock, log, progress

BARS = """
import time
from flowhn_jax.utils.progress import activity, log, progress

with activity("compiling"):
    time.sleep(0.6)
for item in progress(range(3), "scoring", "batches"):
    log(f"item {item}")
    time.sleep(0.2)
"""


def in_a_terminal(code):
    """Output of a program whose standard output and standard error are one terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower)
    os.close(follower)
    found = b""
    while True:
        try:
            found += os.read(leader, 4096)
        except OSError:  # the program has ended
            break
    assert process.wait() == 0
    os.close(leader)
    return found.decode()


def test_a_terminal_shows_bars_and_log_lines_above_them():
    shown = in_a_terminal(BARS)
    assert "compiling ... 00:00" in shown
    assert "scoring   0% |" in shown
    assert "0/3 batches" in shown
    assert re.search(r"\r +\ritem 1\r\n\rscoring", shown)  # the bar is cleared, and drawn again


def test_a_pipe_gets_no_carriage_return():
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "item 0\nitem 1\nitem 2\n"
    assert done.stderr == "compiling ...\n"


def test_long_work_prints_a_line_with_percentage_and_time_left(monkeypatch, capsys):
    now = iter(range(0, 100, 5))
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: next(now))
    assert list(progress("abcd", "scoring", "batches")) == list("abcd")
    assert capsys.readouterr().err == (
        "scoring: 50 %, 2/4 batches, 0:10 left\nscoring: 100 %, 4/4 batches, 0:00 left\n"
    )


def test_an_unknown_length_prints_the_count(monkeypatch, capsys):
    monkeypatch.setattr(progress_lib, "_SECONDS_BETWEEN_LINES", 0)
    assert list(progress(iter("ab"), "reading", "files")) == ["a", "b"]
    assert capsys.readouterr().err == "reading: 1 files in 0:00\nreading: 2 files in 0:00\n"


def test_a_line_ends_with_the_text(monkeypatch, capsys):
    monkeypatch.setattr(progress_lib, "_SECONDS_BETWEEN_LINES", 0)
    for count, expected in ((4, "reading: 50 %, 2/4 bytes, 0:00 left"), (iter(()), "")):
        with progress(count, "reading", "bytes") as bar:
            bar.annotate("1.5 MB/s")
            bar.update(2)
        expected = expected or "reading: 2 bytes in 0:00"
        assert capsys.readouterr().err == f"{expected}, 1.5 MB/s\n"


@pytest.mark.parametrize(("enabled", "first"), [(False, True), (True, False)])
def test_nothing_is_shown_when_disabled_or_in_other_processes(monkeypatch, capsys, enabled, first):
    monkeypatch.setattr(progress_lib, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress_lib, "_is_first_process", lambda: first)
    with progress(2, "scoring", "batches", enabled=enabled) as bar:
        bar.update()
    with activity("compiling", enabled):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_bar_can_move_back_and_show_a_text(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(10, "training", "steps", initial=6) as bar:
        bar.move_to(2)
        bar.annotate("loss 1.5")
    assert "2/10 steps" in terminal.getvalue()
    assert "loss 1.5" in terminal.getvalue()


def test_durations():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
    ]


def test_log_writes_a_line(capsys):
    log("hello")
    assert capsys.readouterr() == ("hello\n", "")
