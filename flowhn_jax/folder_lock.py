"""One process at a time in a folder, by a lock on the folder itself."""

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def try_lock(folder: pathlib.Path) -> Iterator[bool]:
    """Hold a folder's lock where it is free; the value says whether it was.

    The lock is on the folder, not on a file in it that could be removed or replaced; the system
    takes it back from a process that dies.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
