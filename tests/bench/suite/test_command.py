"""The suite in a separate process, stopped and killed; fake parts with the names of real ones."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from flowhn_jax.bench.suite.command import run_suite
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.utils.lock import try_lock
from tests.bench.suite import fake_parts

ROOT = pathlib.Path(__file__).parents[3]
PACKAGE = fake_parts.__name__


def start(folder, *parts, minutes=1.0):
    """Start a suite of parts given as NAME=MODULE."""
    command = [sys.executable, "-u", "-m", PACKAGE, str(folder), str(minutes), *parts]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found
    return found


def is_running(pid):
    """Return whether a process is alive; a zombie is not."""
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def descendants(pid):
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def read(folder):
    return json.loads((folder / "suite.json").read_text())


def complete_keys(content, name):
    rows = content["parts"].get(name, {"rows": []})["rows"]
    return {row["key"] for row in rows if not row.get("partial") and "failed" not in row}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_complete_files(tmp_path, log_of_parts, number):
    """SIGINT reaches the worker too, as Ctrl-C does."""
    folder = tmp_path / "out"
    process = start(folder, "tiles=steady", "inference=slow")
    wait_for(lambda: fake_parts.begun("slow", "k3"))
    sent = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert process.returncode == 0, errors
    assert errors == ""
    content = read(folder)
    assert complete_keys(content, "tiles") == {"a", "b", "c"}
    done = complete_keys(content, "inference")
    assert {"k0", "k1", "k2"} <= done < {f"k{i}" for i in range(12)}
    assert "Traceback" not in (folder / "suite.log").read_text()
    page = (folder / "suite.md").read_text()
    assert page.startswith("# FlowHN on ? x fake\n")
    assert "\n## Missing\n" in page
    assert re.search(r"- Part inference: k\d", page)
    missing = re.search(rf"Stopped by {number.name}. Missing:\n  Part inference: (k\d+)", out)
    assert missing[1] not in done
    assert "Run the same command again to continue." in out
    assert "\n  k0: slow measured k0\n" in out


@pytest.mark.slow
def test_a_suite_killed_at_any_moment_can_be_continued(tmp_path, log_of_parts):
    """Kill twice during the start, and four times within a second after a row has begun."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    folder, delays = tmp_path / "out", random.Random(seed)
    existed, before = False, set()
    for is_early in delays.sample([True, False], counts=[2, 4], k=6):
        begun = len(fake_parts.entries())
        process = start(folder, "tiles=steady", "inference=slow")
        if is_early:
            time.sleep(delays.uniform(0.5, 2))
        else:
            wait_for(lambda n=begun, p=process: len(fake_parts.entries()) > n or p.poll() == 0)
            time.sleep(delays.uniform(0, 1))
        family = descendants(process.pid)
        process.kill()
        process.communicate()
        workers = {entry.pid for entry in fake_parts.entries()}
        wait_for(lambda pids=(*family, *workers): not any(map(is_running, pids)), 5)
        if existed or (folder / "suite.json").exists():
            existed = True
            assert len(list(folder.iterdir())) <= 8
            content = read(folder)
            done = {
                (name, key) for name in content["parts"] for key in complete_keys(content, name)
            }
            assert before <= done
            before = done
    process = start(folder, "tiles=steady", "inference=slow")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Missing" not in out
    content = read(folder)
    assert complete_keys(content, "tiles") == {"a", "b", "c"}
    assert complete_keys(content, "inference") == {f"k{i}" for i in range(12)}
    assert {path.name for path in folder.iterdir()} == {"suite.json", "suite.md", "suite.log"}
    assert "## Missing" not in (folder / "suite.md").read_text()


@pytest.fixture
def killed_in_a_hang(tmp_path, log_of_parts):
    """Yield a suite that was killed after its third key hung for 1.5 seconds."""
    process = start(tmp_path / "out", "tiles=hangs")
    wait_for(lambda: fake_parts.begun("hangs", "b"))
    time.sleep(1.5)
    process.kill()
    process.wait()
    yield process
    for pid in {entry.pid for entry in fake_parts.entries()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)


def test_a_kill_ends_a_worker_that_hangs(killed_in_a_hang):
    (worker,) = {entry.pid for entry in fake_parts.entries()}
    wait_for(lambda: not is_running(worker), 5)


def test_a_kill_loses_no_row_that_was_shown_a_second_ago(killed_in_a_hang, tmp_path):
    """suite.json is saved after each row, even if the next one never comes."""
    assert "  a: hangs measured a" in killed_in_a_hang.communicate(timeout=30)[0]
    assert complete_keys(read(tmp_path / "out"), "tiles") == {"x", "a"}


def test_a_second_suite_in_a_folder_is_rejected(tmp_path, log_of_parts):
    folder = tmp_path / "out"
    process = start(folder, "tiles=hangs")
    try:
        wait_for(lambda: fake_parts.begun("hangs", "b"))
        before = (folder / "suite.json").read_bytes()
        with pytest.raises(ValueError, match=r"is in use by another suite. Wait for it, or give"):
            run(folder, ("tiles", "steady"))
        assert (folder / "suite.json").read_bytes() == before
        assert fake_parts.begun("steady", "a") == 0
    finally:
        process.kill()
        process.communicate()


def run(folder, *parts, minutes=1.0):
    made = [Part(name, f"Part {name}", f"{PACKAGE}.{module}", 1.0) for name, module in parts]
    return run_suite(str(folder), minutes, made, f"{PACKAGE}.machine")


def test_the_lock_is_free_after_a_suite(tmp_path, log_of_parts, capsys):
    assert run(tmp_path / "out", ("tiles", "steady"))
    with try_lock(tmp_path / "out") as is_free:
        assert is_free
    assert run(tmp_path / "out", ("tiles", "steady"))
    assert "Missing" not in capsys.readouterr().out
    assert [entry.key for entry in fake_parts.entries()] == ["a", "b", "c"]


def test_wrong_numbers_are_printed_and_returned(tmp_path, log_of_parts, capsys):
    assert not run(tmp_path / "out", ("accuracy", "wrong"))
    text = capsys.readouterr().out
    assert "WRONG: scan/plain/xla/float32: error 0.5, gradients 2.0 (u), tolerance 0.0001" in text
    assert "\033" not in text
    page = (tmp_path / "out" / "suite.md").read_text()
    assert "Wrong numbers" in page.splitlines()[4]
