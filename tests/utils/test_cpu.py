"""How processes of their own allocate memory, and which of them restart."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from flowhn_jax.utils import cpu

ROOT = pathlib.Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory is Linux's")

# Prints what the process is, and the page faults of a block of 64 MiB that a thread, as one of
# XLA's, allocates and writes for the tenth time.
_PROGRAM = """
import ctypes, json, os, resource, sys, threading
from flowhn_jax.utils import cpu
{before}
cpu.prepare_memory()
faults = []
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def work():
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(2**26)
        ctypes.memset(block, 1, 2**26)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), faults[-1]]))
"""
_PAGES = 2**26 // 4096


def run(command, **environment):
    """Return the pid of a started process, and what it printed."""
    unset = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, *command],
        env=unset | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (line,) = out.splitlines()
    return process.pid, json.loads(line)


@pytest.fixture
def program(tmp_path):
    """Return a function that writes the program under a name, with a line before the call."""

    def write(name, before=""):
        path = tmp_path / name
        path.write_text(_PROGRAM.format(before=before))
        return str(path)

    return write


on_request = pytest.mark.skipif(
    sys.platform == "linux" and cpu._huge_pages() != "on request",
    reason="the kernel and glibc give huge pages always or never",
)


@LINUX
@on_request
@pytest.mark.parametrize("name", ["train.py", "eval.py", "flowhn"])
def test_a_program_replaces_itself_once(program, name):
    pid, printed = run(["-W", "ignore", program(name), "--x=1", "a b"])
    assert printed[:3] == [pid, ["--x=1", "a b"], "glibc.malloc.hugetlb=1"]
    assert printed[3] < _PAGES / 16


@LINUX
@on_request
def test_other_tunables_stay(program):
    other = "glibc.malloc.tcache_count=8"
    _, printed = run([program("train.py")], GLIBC_TUNABLES=other)
    assert printed[2] == f"{other}:glibc.malloc.hugetlb=1"


@LINUX
@pytest.mark.parametrize("how", ["other file", "code", "argument", "refused", "old glibc"])
def test_elsewhere_freed_memory_is_kept(program, how):
    """Not by a program of another name, code, a program's name as an argument, or a refusal."""
    environment, before = {}, ""
    command = [program("program.py")]
    if how == "code":
        command = ["-c", _PROGRAM.format(before="")]
    elif how == "argument":
        command += ["train.py"]
    elif how == "refused":
        command, environment = [program("train.py")], {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    elif how == "old glibc":
        before = 'cpu.platform.libc_ver = lambda: ("glibc", "2.31")'
        command = [program("train.py", before)]
    _, printed = run(command, **environment)
    assert printed[2] == environment.get("GLIBC_TUNABLES")
    assert printed[3] < _PAGES / 16


@LINUX
@pytest.mark.parametrize(
    ("setting", "tunables", "expected"),
    [
        ("[always] madvise never", "", "always"),
        ("[always] madvise never", "glibc.malloc.hugetlb=0", "always"),
        ("always [madvise] never", "", "on request"),
        ("always [madvise] never", "glibc.malloc.tcache_count=8", "on request"),
        ("always [madvise] never", "glibc.malloc.check=1:glibc.malloc.hugetlb=2", "always"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "never"),
        ("always madvise [never]", "glibc.malloc.hugetlb=1", "never"),
        (None, "", "never"),
    ],
)
def test_when_pages_are_huge(monkeypatch, tmp_path, setting, tunables, expected):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting + "\n")
    monkeypatch.setattr(cpu, "_KERNEL_SETTING", path)
    monkeypatch.setattr(cpu.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert cpu._huge_pages() == expected


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["train.py"], ["python", "train.py", "--x=1"], True),
        (["/bin/flowhn"], ["python", "/bin/flowhn", "train"], True),
        (["/p/flowhn_jax/compare/__main__.py"], ["python", "-m", "flowhn_jax.compare"], True),
        (["/p/flowhn_jax/__main__.py"], ["python", "-X", "dev", "-m", "flowhn_jax"], True),
        (["train.py"], ["python", "-m", "tools.fuzz"], False),
        (["train.py"], ["python", "-m", "pytest", "tests"], False),
        (["/bin/pytest"], ["python", "/bin/pytest", "-m", "slow"], False),
        (["train.py"], ["python", "-c", "from multiprocessing.spawn import spawn_main"], False),
        ([""], ["python"], False),
        (["-"], ["python", "-"], False),
    ],
)
def test_which_processes_are_programs_of_the_package(monkeypatch, argv, original, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert cpu._is_program_of_package() == expected
