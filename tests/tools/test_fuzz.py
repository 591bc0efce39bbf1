"""The fuzzer runs in its own processes: it forks children, which must happen before JAX starts."""

import json
import pathlib
import subprocess
import sys
import types

import pytest

from tools.fuzz import campaign, patch_points
from tools.fuzz.targets import TARGETS

ROOT = pathlib.Path(__file__).parent.parent.parent
INPUTS = 200

# Programs that do what the fuzzer must detect.
FAULTS = """
import json, os, pathlib, pickle, socket, sys, time
from tools.fuzz import child

root = pathlib.Path(sys.argv[1])
outside = root / "outside"

def writes_through_a_link():
    os.symlink(outside, "link")
    open("link", "w")

def changes_unseen():
    os.system = None  # like C code, which raises no audit event
    import ctypes
    name = str(pathlib.Path("../neighbour/more").resolve()).encode()
    ctypes.CDLL(None).mkdir(name, 0o700)

def works_and_waits():
    for _ in range(6):
        time.sleep(0.35)
        end = time.process_time() + 0.03
        while time.process_time() < end:
            pass

PROGRAMS = {
    "success": lambda: print("fine"),
    "refusal": lambda: sys.exit("error: x must be 2; got 1."),
    "traceback": lambda: 1 / 0,
    "patience": works_and_waits,
    "hang": lambda: time.sleep(60),
    "busy": lambda: [None for _ in iter(int, 1)],
    "write": lambda: outside.write_text("mine"),
    "link": writes_through_a_link,
    "remove": lambda: os.remove("../neighbour/precious"),
    "folder": lambda: os.mkdir("../more"),
    "rename": lambda: os.rename("../neighbour/precious", "mine"),
    "unseen": changes_unseen,
    "pickle": lambda: pickle.loads(pickle.dumps(print)),
    "connection": lambda: socket.create_connection(("127.0.0.1", 9)),
    "program": lambda: os.system("true"),
    "signal": lambda: os.kill(os.getpid(), 11),
    "silence": lambda: sys.exit(3),
    "two messages": lambda: sys.exit("error: one\\nerror: two"),
    "long message": lambda: sys.exit("error: " + "x" * 10_000),
    "memory": lambda: bytearray(1 << 40),
}
found = {}
for name, program in PROGRAMS.items():
    sandbox = child.Sandbox(root / name)
    outcome = child.run(child.Case(program, [], "damaged"), sandbox, 0.5)
    found[name] = [outcome.verdict, outcome.reason]
for name, case in {
    "accepted escape": child.Case(PROGRAMS["success"], [], "a link", must_refuse=True),
    "refused valid": child.Case(PROGRAMS["refusal"], []),
}.items():
    found[name] = list(child.run(case, child.Sandbox(root / name), 0.5)[:2])
print(json.dumps(found))
"""


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_kind_of_failure_is_detected(tmp_path):
    run = python("-c", FAULTS, str(tmp_path))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.pop("success") == ["accepted", ""]
    assert found.pop("refusal") == ["refused", ""]
    assert found.pop("patience") == ["accepted", ""]  # 2 s, but little CPU time
    expected = {
        "traceback": "a traceback",
        "hang": "a hang of 0.5 s",
        "busy": "a hang of 0.5 s",
        "write": "open for writing outside its folder",
        "link": "open for writing outside its folder",
        "remove": "os.remove outside its folder",
        "folder": "os.mkdir outside its folder",
        "rename": "os.rename outside its folder",
        "unseen": "a change outside its folder",
        "pickle": "unpickles",
        "connection": "uses the network",
        "program": "starts a program",
        "signal": "ended by SIGSEGV",
        "silence": "status 3 with 0 lines of error",
        "two messages": "status 1 with 2 lines of error",
        "long message": "a message that is too long",
        "memory": "a traceback",
        "accepted escape": "accepted what must be refused",
        "refused valid": "refused a valid input",
    }
    assert set(found) == set(expected)
    for name, reason in expected.items():
        assert found[name][0] == "failed", name
        assert found[name][1].startswith(reason), (name, found[name])


def test_no_fresh_input_fails():
    """Inputs differ in every run; a failure is printed with the command that repeats it."""
    run = python("-m", "tools.fuzz", f"--inputs={INPUTS}")
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-3000:]
    *rows, last = run.stdout.splitlines()
    assert last.split()[:4] == ["|", "all", "|", f"{INPUTS:,}"]
    assert {row.split()[1] for row in rows if row.startswith("| ")} >= set(TARGETS)


def test_a_seed_repeats_its_input():
    arguments = ["--seed=1", "--only=3", "--targets=prepare_jsonl"]
    first, second = (python("-m", "tools.fuzz", *arguments) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0] == second.stdout.splitlines()[0]
    assert "input 3 of prepare_jsonl" in first.stdout


# Applied in a child process, as they replace functions of this project's modules.
PATCHES = """
from tools.fuzz import measuring_patch_points, patch_points

patch_points.for_train()
patch_points.for_eval()
measuring_patch_points.for_aot()
measuring_patch_points.for_compare()
measuring_patch_points.for_bench()
"""


def test_every_name_that_is_replaced_exists():
    run = python("-c", PATCHES)
    assert run.returncode == 0, run.stderr


def test_a_missing_name_is_an_error():
    module = types.ModuleType("a_module")
    module.fit = len
    patch_points.replace(module, fit=max)
    assert module.fit is max
    assert patch_points.with_replaced(module, fit=min).fit is min
    assert module.fit is max
    for replace in (patch_points.replace, patch_points.with_replaced):
        with pytest.raises(AttributeError, match="a_module has no 'train' for the fuzzer"):
            replace(module, train=max)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"--targets must be among recipe, .*; got 'nothing'"):
        campaign.parse_targets("text,nothing")
    with pytest.raises(ValueError, match="--inputs must be at least 1; got 0"):
        campaign.run(1, 0, ("text",))
