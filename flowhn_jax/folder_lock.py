"""One process at a time in a folder, by a lock on the folder itself."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator

# What file systems answer that lock only files which are open for writing, as NFS does.
_NOT_FOR_FOLDERS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)
_FILE = ".locked"


@contextlib.contextmanager
def try_lock(folder: pathlib.Path) -> Iterator[bool]:
    """Hold a folder's lock where it is free; the value says whether it was.

    The lock is on the folder, not on a file in it that could be removed or replaced; the system
    takes it back from a process that dies. Only where the file system locks no folders it is on a
    file `.locked` in it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            is_free = _lock(descriptor)
        except OSError as error:
            if error.errno not in _NOT_FOR_FOLDERS:
                raise
            os.close(descriptor)
            descriptor = os.open(folder / _FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            is_free = _lock(descriptor)
        yield is_free
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a file or folder that is open; return whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
