"""One process at a time in a folder, by a lock on the folder itself."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator

# What file systems answer that lock only files which are open for writing, as NFS does.
_NOT_FOR_FOLDERS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK_FILE = ".locked"


@contextlib.contextmanager
def try_lock(folder: pathlib.Path) -> Iterator[bool]:
    """Hold a folder's lock where it is free; the value says whether it was.

    The lock is on the folder, not on a file in it that could be removed or replaced; the system
    takes it back from a process that dies. Only where the file system locks no folders it is on a
    file `.locked` in it.
    """
    with _tried(folder) as (_, is_free):
        yield is_free


@contextlib.contextmanager
def wait_for_lock(folder: pathlib.Path, when_taken: Callable[[], None]) -> Iterator[bool]:
    """Hold a folder's lock, after `when_taken` and a wait where another process has it.

    The value is False where that process has removed or renamed the folder: then the lock is on
    nothing of this name.
    """
    with _tried(folder) as (descriptor, is_free):
        if not is_free:
            when_taken()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _has_name(folder, descriptor)


@contextlib.contextmanager
def _tried(folder: pathlib.Path) -> Iterator[tuple[int, bool]]:
    """Open what is to be locked, the folder or the file in it, and whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            is_free = _lock(descriptor)
        except OSError as error:
            if error.errno not in _NOT_FOR_FOLDERS:
                raise
            os.close(descriptor)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            is_free = _lock(descriptor)
        yield descriptor, is_free
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file or folder that is open; return whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(folder: pathlib.Path, descriptor: int) -> bool:
    """Return whether the folder, or the file in it, is the one that is open."""
    with contextlib.suppress(FileNotFoundError):
        opened = os.fstat(descriptor)
        return any(
            os.path.samestat(path.stat(), opened)
            for path in (folder, folder / LOCK_FILE)
            if path.exists()
        )
    return False
