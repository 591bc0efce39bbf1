"""Parts of a suite that misbehave on purpose, and append their measurements to a file."""

import os
import pathlib
import signal
import time
from typing import Any, NamedTuple

CODE = "0123456789ab"  # in place of the hash of the code
VARIABLE = "FLOWHN_FAKE_PARTS_LOG"  # path of the file


class Entry(NamedTuple):
    """One measurement that a part has begun."""

    part: str
    key: str
    pid: int


def begin(module: str, key: str) -> dict[str, Any]:
    """Append a measurement to the file and return its row."""
    part = module.rpartition(".")[2]
    with open(os.environ[VARIABLE], "a") as file:
        file.write(f"{part} {key} {os.getpid()}\n")
    return {"key": key, "summary": f"{part} measured {key}", "pid": os.getpid()}


def entries() -> list[Entry]:
    """Return all measurements that were begun, in their order."""
    path = pathlib.Path(os.environ[VARIABLE])
    lines = path.read_text().splitlines() if path.exists() else []
    return [Entry(part, key, int(pid)) for part, key, pid in map(str.split, lines)]


def begun(module: str, key: str) -> int:
    """Return how many times a part has begun a measurement."""
    part = module.rpartition(".")[2]
    return sum((entry.part, entry.key) == (part, key) for entry in entries())


def die() -> None:
    """End this process as a crash does."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Never return."""
    while True:
        time.sleep(60)
