"""One trainer at a time in a workdir."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import IO

from flowhn_jax.training import disk

_FILE = "lock"


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Holds the workdir's lock, which the system takes back from a process that dies.

    The file stays and tells who had the lock last; it means nothing without the lock on it.

    Raises:
      ValueError: another process holds it; the message names its host and process id.
    """
    path = pathlib.Path(workdir) / _FILE
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{workdir!r} is in use by {_holder(file)}; wait for it, stop it, or give another "
                "--workdir."
            ) from None
        file.truncate(0)
        try:
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        except OSError as error:  # the lock is what counts
            if not disk.is_full(error):
                raise
        yield


def _holder(file: IO) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it is about to write it
        return "another process"
