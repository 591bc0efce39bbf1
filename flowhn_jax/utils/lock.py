"""One process at a time in a folder: a lock on the folder itself."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator

# Errors of file systems that lock only files opened for writing, as NFS does.
_NO_FOLDER_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK_FILE = ".locked"


@contextlib.contextmanager
def try_lock(folder: pathlib.Path) -> Iterator[bool]:
    """Take a folder's lock if it is free, and hold it in the context; yield whether it was free.

    The lock is on the folder, not on a file in it that could be removed or replaced; the system
    releases it when the process dies. Only on a file system that cannot lock folders is it on a
    file `.locked` in the folder.
    """
    with _tried(folder) as (_, is_free):
        yield is_free


@contextlib.contextmanager
def wait_for_lock(folder: pathlib.Path, when_taken: Callable[[], None]) -> Iterator[bool]:
    """Take a folder's lock and hold it in the context, waiting for another process if need be.

    `when_taken` is called before the wait. The context yields False if the other process has
    removed or renamed the folder meanwhile: the lock then protects no folder of this name.
    """
    with _tried(folder) as (descriptor, is_free):
        if not is_free:
            when_taken()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield _has_name(folder, descriptor)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path, when_taken: Callable[[], None]) -> Iterator[None]:
    """Create a folder if need be, and hold its lock in the context, as `wait_for_lock` does."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                is_owner = stack.enter_context(wait_for_lock(folder, when_taken))
            except FileNotFoundError:  # the owner has just removed the folder
                continue
            if is_owner:
                yield
                return


@contextlib.contextmanager
def _tried(folder: pathlib.Path) -> Iterator[tuple[int, bool]]:
    """Yield the descriptor of what is locked, the folder or the file in it; and if it was free."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            is_free = _lock(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_LOCKS:
                raise
            os.close(descriptor)
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            is_free = _lock(descriptor)
        yield descriptor, is_free
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file or folder if it is free; return whether it was."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(folder: pathlib.Path, descriptor: int) -> bool:
    """Return whether the folder, or the file in it, is still the one that is open."""
    with contextlib.suppress(FileNotFoundError):
        opened = os.fstat(descriptor)
        return any(
            os.path.samestat(path.stat(), opened)
            for path in (folder, folder / LOCK_FILE)
            if path.exists()
        )
    return False
