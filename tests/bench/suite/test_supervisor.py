"""The supervisor, with parts that raise, crash, hang and forget."""

import json
import os
import re
import signal
import threading
import time

import pytest

from flowhn_jax.bench.suite.document import FILE, Document, code_hash
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.bench.suite.supervisor import LOG, Supervisor
from tests.bench.suite import fake_parts

PACKAGE = fake_parts.__name__
DEATH = "the worker process died (SIGKILL)"


def part(module, share=1.0, least=0.0, name=None, **settings):
    name = name or module
    return Part(name, f"Part {name}", f"{PACKAGE}.{module}", share, least, **settings)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "suite"
    path.mkdir()
    return path


@pytest.fixture
def run(folder, log_of_parts, capsys):
    """Return a function that runs parts in the folder and returns suite.json and the log."""

    def run_parts(*parts, seconds=60.0, machine="machine", log=None, on_part=lambda: None):
        lines = []

        def on_line(line):
            lines.append(line)
            if log is not None:
                log(line)

        supervisor = Supervisor(
            parts,
            Document.open(folder),
            folder,
            seconds=seconds,
            describes=f"{PACKAGE}.{machine}",
            log=on_line,
            on_part=on_part,
        )
        supervisor.run()
        return json.loads((folder / FILE).read_text()), "\n".join(lines)

    return run_parts


def keys(content, name):
    """Return the keys of a part's complete rows without a failure."""
    rows = content["parts"][name]["rows"]
    return [row["key"] for row in rows if not row.get("partial") and "failed" not in row]


def failures(content, name):
    rows = content["parts"][name]["rows"]
    return {row["key"]: row["failed"] for row in rows if "failed" in row}


def measured(name):
    return [entry.key for entry in fake_parts.entries() if entry.part == name]


def test_rows_arrive_in_suite_json_and_later_parts_see_them(run, folder):
    content, log = run(part("steady"), part("nothing"), part("steady", name="again"))
    assert content["machine"] == {"device": "fake", "platform": "test"}
    assert keys(content, "steady") == keys(content, "again") == ["a", "b", "c"]
    assert content["parts"]["again"]["rows"][2]["earlier"]["steady"] == ["a", "b", "c"]
    assert content["parts"]["again"]["rows"][2]["earlier"]["again"] == []
    assert content["parts"]["nothing"]["planned"] == []
    assert len({entry.pid for entry in fake_parts.entries()}) == 1
    assert "  b: steady measured b" in log
    assert (folder / LOG).read_text().count("steady is at b") == 2
    assert content["seconds"] > 0


def test_settings_of_the_environment_take_another_process(run):
    content, _ = run(
        part("steady", name="first", environment={"FAKE_SETTING": "1"}),
        part("steady", name="second", environment={"FAKE_SETTING": "2"}),
    )
    found = [
        row["setting"] for name in ("first", "second") for row in content["parts"][name]["rows"]
    ]
    assert found == ["1", "1", "1", "2", "2", "2"]
    assert len({entry.pid for entry in fake_parts.entries()}) == 2


def test_workers_on_a_cpu_wait_for_later_parts(run):
    """One for parts that measure time and one for the others, whatever the settings of a GPU."""
    content, _ = run(
        part("steady", name="timed"),
        part("steady", name="untimed", is_timed=False),
        part("steady", name="again", environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),
        part("dies", name="fatal", is_timed=False),
        part("steady", name="last", is_timed=False),
        machine="cpu_machine",
    )
    pids = {
        name: {row["pid"] for row in each["rows"] if "pid" in row}
        for name, each in content["parts"].items()
    }
    assert len(pids["timed"]) == len(pids["untimed"]) == len(pids["last"]) == 1
    assert pids["timed"] == pids["again"]
    assert not pids["timed"] & pids["untimed"]
    assert pids["untimed"] < pids["fatal"]
    assert not pids["last"] & pids["untimed"]
    assert keys(content, "last") == ["a", "b", "c"]
    assert not any(is_alive(entry.pid) for entry in fake_parts.entries())


def test_a_part_that_raises_is_one_message_and_the_others_continue(run, folder):
    content, log = run(
        part("raises"), part("raises_in_plan"), part("no_such_module"), part("steady")
    )
    found = {name: each["failed"] for name, each in content["parts"].items()}
    assert found["raises"] == "ValueError: the first line"
    assert found["raises_in_plan"] == "OSError: no plan"
    assert found["no_such_module"].startswith("ModuleNotFoundError: No module named")
    assert keys(content, "raises") == ["a"]
    assert keys(content, "steady") == ["a", "b", "c"]
    assert log.count("failed: ValueError: the first line") == 1
    assert "second line" not in log
    assert measured("raises") == ["a"]
    assert "the second line" in (folder / LOG).read_text()


def test_a_crash_costs_the_key_at_which_it_happens(run):
    """After the first crash the keys run one by one, to find the cause."""
    content, log = run(part("dies"), part("steady"))
    assert failures(content, "dies") == {"b": DEATH, "e": DEATH}
    assert sorted(keys(content, "dies")) == ["a", "c", "d"]
    assert measured("dies") == ["a", "b", "b", "c", "d", "e"]
    assert keys(content, "steady") == ["a", "b", "c"]
    assert f"  b: failed: {DEATH}" in log


def test_a_crash_in_plan_costs_that_part(run):
    content, log = run(part("dies_in_plan"), part("steady"))
    assert content["parts"]["dies_in_plan"]["failed"] == DEATH
    assert keys(content, "steady") == ["a", "b", "c"]
    assert f"failed: {DEATH}" in log


def test_a_worker_that_dies_between_two_parts_is_replaced(run):
    content, _ = run(part("dies_later"), part("steady"), on_part=lambda: time.sleep(1))
    assert keys(content, "dies_later") == ["a"]
    assert keys(content, "steady") == ["a", "b", "c"]


def test_a_crash_is_noticed_while_a_child_holds_the_connection(run):
    content, _ = run(part("dies_with_child"), seconds=8)
    assert failures(content, "dies_with_child") == {"a": DEATH}
    assert keys(content, "dies_with_child") == ["b"]


def test_a_part_that_hangs_is_interrupted_and_continued_after_the_others(run):
    """Its share is 4 of 40 seconds, including the start of the worker."""
    interrupted = []

    def log(line):
        if "time limit reached" in line:
            interrupted.append(time.monotonic() - start)

    start = time.monotonic()
    parts = part("hangs_once", share=0.1), part("steady", share=0.9)
    content, text = run(*parts, seconds=40, log=log)
    assert 3.8 < interrupted[0] < 6
    assert content["parts"]["hangs_once"]["postponed"] == ["b"]
    assert keys(content, "hangs_once") == ["a", "c", "b"]
    assert measured("hangs_once") == ["a", "b", "c", "b"]
    order = [entry.part for entry in fake_parts.entries()]
    assert order == 2 * ["hangs_once"] + 3 * ["steady"] + 2 * ["hangs_once"]
    assert re.findall(r"Part (\w+) \(", text) == ["hangs_once", "steady", "hangs_once"]


def test_a_hang_ends_when_the_time_is_over(run):
    start = time.monotonic()
    content, _ = run(part("hangs"), seconds=4)
    assert 3.8 < time.monotonic() - start < 5.5
    assert keys(content, "hangs") == ["x", "a"]
    assert content["parts"]["hangs"]["failed"] is None


def test_rows_without_a_pause_do_not_outlast_the_time(run):
    start = time.monotonic()
    content, _ = run(part("floods"), seconds=4)
    assert time.monotonic() - start < 5.5
    assert 0 < len(keys(content, "floods")) < 400


def test_a_signal_is_answered_while_rows_come_without_a_pause(run):
    def log(line):
        if line.startswith("  k20:"):
            os.kill(os.getpid(), signal.SIGTERM)

    content, _ = run(part("floods"), log=log)
    assert 20 < len(keys(content, "floods")) < 20 + 100  # those of two seconds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_suite_within_a_second(run, number):
    before, times = signal.getsignal(number), []

    def send():
        times.append(time.monotonic())
        os.kill(os.getpid(), number)

    def log(line):
        if line.startswith("  a:"):
            threading.Timer(0.5, send).start()

    content, _ = run(part("hangs"), log=log)
    assert time.monotonic() - times[0] < 1.5
    assert keys(content, "hangs") == ["x", "a"]
    assert signal.getsignal(number) == before
    assert not any(is_alive(entry.pid) for entry in fake_parts.entries())


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_run_continues_where_the_first_one_stopped(run):
    def stop(line):
        if line.startswith("  k3"):
            os.kill(os.getpid(), signal.SIGTERM)

    first, _ = run(part("steady"), part("slow"), log=stop)
    assert 4 <= len(keys(first, "slow")) < 12
    done = keys(first, "steady") + keys(first, "slow")
    second, _ = run(part("steady"), part("slow"))
    assert set(keys(second, "slow")) == {f"k{i}" for i in range(12)}
    counts = {key: measured("steady").count(key) + measured("slow").count(key) for key in done}
    assert set(counts.values()) == {1}
    assert second["seconds"] > first["seconds"] > 0
    third, log = run(part("steady"), part("slow"))
    assert log == ""
    assert third["parts"] == second["parts"]


def test_failed_rows_are_tried_again_last(run):
    first, _ = run(part("fails_once"), part("raises"))
    assert failures(first, "fails_once") == {"a": "ValueError: not yet"}
    assert keys(first, "fails_once") == ["b", "c"]
    assert measured("fails_once") == ["a", "b", "c"]
    second, _ = run(part("fails_once"), part("raises"))
    assert failures(second, "fails_once") == {}
    assert measured("fails_once") == ["a", "b", "c", "a"]
    assert measured("raises") == ["a", "b"]
    assert second["parts"]["raises"]["failed"] == "ValueError: the first line"


def test_failed_keys_come_after_those_that_were_never_tried(folder):
    document = Document(folder)
    document.part("x")["planned"] = ["a", "b", "c"]
    document.add("x", {"key": "a", "failed": "ValueError: not yet"})
    document.save()
    again = Document.open(folder)
    assert again.missing("x") == ["b", "c", "a"]
    assert again.rows()["x"] == [{"key": "a", "failed": "ValueError: not yet", "partial": True}]
    again.save()
    assert Document.open(folder).missing("x") == ["b", "c", "a"]


def test_a_key_without_a_complete_row_has_failed(run):
    content, _ = run(part("forgets"))
    assert keys(content, "forgets") == ["a", "d"]
    assert failures(content, "forgets") == dict.fromkeys("bc", "the part gave no result")
    assert len(content["parts"]["forgets"]["rows"]) == 4
    assert measured("forgets") == ["a", "b", "c", "d"]


def test_a_part_that_would_get_too_little_time_waits_for_the_others(run):
    """It would get 4 of 40 seconds and needs 10."""
    _, log = run(
        part("steady", name="first", share=0.5),
        part("nothing", name="picky", share=0.1, least=10),
        part("steady", name="last", share=0.4),
        seconds=40,
    )
    seconds = dict(re.findall(r"Part (\w+) \((\d+) s\)", log))
    assert list(seconds) == ["first", "last", "picky"]
    assert int(seconds["first"]) == 22  # 5 of 9 parts of 40 seconds
    assert int(seconds["picky"]) > 25


def test_unused_time_goes_to_the_next_part(run):
    _, log = run(part("nothing", share=0.5), part("steady", share=0.5), seconds=40)
    seconds = dict(re.findall(r"Part (\w+) \((\d+) s\)", log))
    assert int(seconds["nothing"]) == 20
    assert int(seconds["steady"]) > 30


def test_results_of_other_code_are_rejected(run, folder):
    content, _ = run(part("steady"))
    path = folder / FILE
    path.write_text(json.dumps(content | {"code": "ba9876543210"}))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"must be a folder of this version.*ba9876543210.*0123456789ab.*--out"
    ):
        run(part("steady"))
    assert path.read_bytes() == before


def test_the_hash_of_the_code_is_that_of_its_sources(tmp_path):
    for name in ("flowhn_jax/__init__.py", "kernels/scan.py", "configs/tiny.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x = 1\n")
    found = [code_hash(tmp_path)]
    (tmp_path / "flowhn_jax" / "note.txt").write_text("not a source")
    assert code_hash(tmp_path) == found[0]
    (tmp_path / "kernels" / "scan.py").write_text("x = 2\n")
    found.append(code_hash(tmp_path))
    (tmp_path / "kernels" / "scan.py").rename(tmp_path / "kernels" / "other.py")
    found.append(code_hash(tmp_path))
    (tmp_path / "configs" / "tiny.py").unlink()
    found.append(code_hash(tmp_path))
    assert len(set(found)) == 4


def test_results_of_another_machine_are_rejected(run, folder):
    content, _ = run(part("steady"))
    message = "this machine's .* device is 'fake', here it is 'another fake'. Give another --out"
    with pytest.raises(ValueError, match=message):
        run(part("hangs"), machine="other_machine")
    after = json.loads((folder / FILE).read_text())
    assert after["parts"]["steady"] == content["parts"]["steady"]
    assert after["machine"] == content["machine"]


def test_a_device_that_cannot_be_used_is_one_message(run, folder):
    with pytest.raises(RuntimeError, match=r"cannot use the device.*status 1.*suite.log"):
        run(part("steady"), machine="no_machine")
    assert "no device answers" in (folder / LOG).read_text()
    assert json.loads((folder / FILE).read_text())["machine"] is None


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', "[]", "3", "null", "[" * 10**5])
def test_a_damaged_file_is_one_message(folder, text):
    (folder / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"suite\.json") as caught:
        Document.open(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_temporary_file_left_by_a_kill_is_removed(folder):
    document = Document(folder)
    document.save()
    (folder / ".unfinished").write_text('{"form')
    Document.open(folder)
    assert [path.name for path in folder.iterdir()] == [FILE]
