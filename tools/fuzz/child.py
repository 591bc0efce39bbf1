"""Run one fuzzed input: a command line in a forked child process that is watched."""

import atexit
import faulthandler
import os
import pathlib
import resource
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

_MEMORY_BYTES = 4 << 30  # that a child may allocate in addition to what it starts with
_FILE_BYTES = 64 << 20
_MESSAGE_CHARACTERS = 2000  # a longer message is a failure
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events that change the file system -> positions of their paths and folder descriptors.
_CHANGES = {
    "os.chmod": ((0, 2),),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
}
_FORBIDDEN = {
    "os.exec": "starts a program",
    "os.posix_spawn": "starts a program",
    "os.system": "starts a program",
    "pickle.find_class": "unpickles",
    "socket.connect": "uses the network",
    "socket.getaddrinfo": "uses the network",
    "subprocess.Popen": "starts a program",
}


class Case(NamedTuple):
    """An input: a command line in a folder.

    Attributes:
      program: the command, as a function that reads `sys.argv`.
      arguments: its command line.
      note: how a valid input was changed; '' if it was not.
      must_refuse: whether success is a failure.
    """

    program: Callable[[], Any]
    arguments: list[str]
    note: str = ""
    must_refuse: bool = False


class Outcome(NamedTuple):
    """The result of a case: `verdict` is accepted, refused or failed (for `reason`)."""

    verdict: str
    reason: str
    output: str


class Sandbox:
    """Folders of one input: `work`, where the program runs, and others that it must not touch."""

    def __init__(self, root: pathlib.Path):
        """Create the folders in `root`, which must not exist."""
        self.root = root
        self.work, self.temporary = root / "work", root / "temporary"
        self.neighbour = root / "neighbour"
        for folder in (self.work, self.temporary, self.neighbour):
            folder.mkdir(parents=True)
        (self.neighbour / "precious").write_text("not yours")
        self.output, self.violations = root / "output", root / "violations"

    def outside(self) -> dict[str, tuple[int, int, int]]:
        """Return inode, size and time of each file outside the working folder."""
        found = {}
        for path in (self.root, *self.neighbour.rglob("*"), *self.root.iterdir()):
            if path not in (self.output, self.violations, self.work, self.temporary):
                stat = path.lstat()
                is_root = path == self.root  # its times change with the output's name
                found[str(path)] = (stat.st_ino, stat.st_size, 0 if is_root else stat.st_mtime_ns)
        return found


def run(case: Case, sandbox: Sandbox, limit_s: float) -> Outcome:
    """Run the case in a child process and kill it after `limit_s` seconds.

    The limit is on CPU time, and on time spent waiting for anything but a core, so that other
    processes on the machine do not matter.
    """
    before = sandbox.outside()
    pid = os.fork()
    if pid == 0:
        _be_child(case, sandbox)
    is_done = _wait(pid, limit_s)
    if not is_done:
        os.kill(pid, signal.SIGUSR1)  # prints its stack
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = sandbox.output.read_text(errors="replace") if sandbox.output.exists() else ""
    violations = sandbox.violations.read_text() if sandbox.violations.exists() else ""
    if not is_done:
        reason = f"a hang of {limit_s:g} s"
    elif violations:
        reason = violations.splitlines()[0]
    elif sandbox.outside() != before:
        reason = "a change outside its folder"
    else:
        reason = _fault(case, status, output)
    if reason:
        return Outcome("failed", reason, output)
    return Outcome("accepted" if status == 0 else "refused", "", output)


def _wait(pid: int, limit_s: float) -> bool:
    """Wait for a process to end; return False if it works or waits for longer than the limit."""
    descriptor, ticks = os.pidfd_open(pid), -1
    try:
        while not select.select([descriptor], [], [], limit_s)[0]:
            with open(f"/proc/{pid}/stat") as file:
                state, *fields = file.read().rpartition(")")[2].split()
            before, ticks = ticks, sum(map(int, fields[10:12]))
            is_idle = ticks == before and state not in "RD"
            if is_idle or ticks > limit_s * os.sysconf("SC_CLK_TCK"):
                return False
    finally:
        os.close(descriptor)
    return True


def _fault(case: Case, status: int, output: str) -> str:
    """Return what is wrong with how the program ended, or ''."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if "Traceback (most recent call last)" in output:
        return "a traceback"
    if status == 0:
        if case.must_refuse:
            return "accepted what must be refused"
        return ""
    if not case.note:
        return "refused a valid input"
    lines = output.splitlines()
    # argparse puts the program's name before it
    errors = [
        n for n, line in enumerate(lines) if line.startswith("error: ") or ": error: " in line
    ]
    if len(errors) != 1:
        return f"status {status} with {len(errors)} lines of error"
    if len("\n".join(lines[errors[0] :])) > _MESSAGE_CHARACTERS:
        return "a message that is too long to read"
    return ""


def _be_child(case: Case, sandbox: Sandbox) -> None:
    status = 1
    try:
        _confine(sandbox)
        status = _status_of(case)
        sys.stdout.flush()
    except BaseException:  # as the interpreter does for the main module
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _confine(sandbox: Sandbox) -> None:
    """Redirect output to a file, set working folder and limits, and watch audit events."""
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    output = os.open(sandbox.output, os.O_CREAT | os.O_WRONLY)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(sandbox.work)
    os.environ |= {"TMPDIR": str(sandbox.temporary), "XDG_CACHE_HOME": str(sandbox.temporary)}
    sys.dont_write_bytecode = True
    warnings.filterwarnings("ignore", "found in sys.modules", RuntimeWarning)  # of runpy
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # exceeding RLIMIT_FSIZE then raises OSError
    report = os.open(sandbox.violations, os.O_CREAT | os.O_WRONLY)
    sys.addaudithook(_watcher(report, (sandbox.work, sandbox.temporary)))


def _status_of(case: Case) -> int:
    """Run the program and return the exit status that the interpreter would give it."""
    sys.argv = ["program", *case.arguments]
    status = 0
    try:
        case.program()
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
            status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return status


def _watcher(report: int, allowed: tuple[pathlib.Path, ...]) -> Callable[[str, Any], None]:
    """Return an audit hook that ends the process when it does something forbidden."""
    roots = tuple(f"{os.path.realpath(folder)}/" for folder in (*allowed, "/proc/self"))

    def end(what: str) -> None:
        os.write(report, f"{what}\n".encode(errors="replace"))
        traceback.print_stack()
        sys.stderr.flush()
        os._exit(1)

    def check(event: str, path: Any, folder: int | None, *, follows: bool) -> None:
        if isinstance(path, int):
            return
        path = os.fsdecode(path)
        if folder is not None and folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        real = os.path.realpath(path) if follows else f"{os.path.realpath(parent)}/{name}"
        if real != os.devnull and not f"{real}/".startswith(roots):
            end(f"{event} outside its folder: {real}")

    def hook(event: str, arguments: Any) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES:
                check("open for writing", path, None, follows=not flags & os.O_NOFOLLOW)
        elif event in _CHANGES:
            for place, folder in _CHANGES[event]:
                descriptor = None if folder is None else arguments[folder]
                check(event, arguments[place], descriptor, follows=event == "os.truncate")
        elif event in _FORBIDDEN:
            end(f"{_FORBIDDEN[event]}: {event} {arguments!r:.200}")

    return hook
