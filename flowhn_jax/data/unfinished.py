"""A folder that is complete or absent: written under another name, renamed at the very end."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from typing import IO

from flowhn_jax.whole_file import sync

_LOCK = "lock"


@contextlib.contextmanager
def unfinished_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `out`, to be filled with files and given to `publish`.

    Whoever holds the lock within owns the folder; a second process that wants it waits. The lock
    ends with its process, however that ends, so that what a killed one left behind is known to be
    nobody's and is removed.

    Raises:
      ValueError: something of another kind has the folder's name, or the lock's: a symbolic link,
        say, behind which files would be removed and written that are not ours.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    lock = _own(folder, out)
    try:
        _clear(folder)
        yield folder
    finally:
        if _is_owned(folder, lock):  # else it has become `out`
            _clear(folder)
            (folder / _LOCK).unlink()
            with contextlib.suppress(OSError):  # the next owner was quick
                folder.rmdir()
        lock.close()


def publish(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Gives `folder`, of `unfinished_folder(out)` and complete, the name `out`.

    What had the name is removed: a set that is to be replaced, or an empty folder.
    """
    sync(folder)
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.is_symlink():
        replaced.unlink()
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    sync(out.parent)
    (out / _LOCK).unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def _own(folder: pathlib.Path, out: pathlib.Path) -> IO:
    while True:
        _check_kind(folder, stat.S_ISDIR)
        folder.mkdir(parents=True, exist_ok=True)
        _check_kind(folder / _LOCK, stat.S_ISREG)
        try:
            lock = (folder / _LOCK).open("w")
        except FileNotFoundError:  # the owner has just removed or published the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that prepares {out}.", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_owned(folder, lock):
            return lock
        lock.close()


def _check_kind(path: pathlib.Path, is_kind: Callable[[int], bool]) -> None:
    """Raises ValueError where there is something else than this code makes, or a link to it."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not is_kind(mode):
        raise ValueError(f"{path} was made by something else; remove it, or choose another name.")


def _is_owned(folder: pathlib.Path, lock: IO) -> bool:
    """Whether the lock that this process holds is the one in the folder of that name."""
    try:
        return os.path.samestat((folder / _LOCK).stat(), os.fstat(lock.fileno()))
    except FileNotFoundError:
        return False


def _clear(folder: pathlib.Path) -> None:
    for file in folder.iterdir():
        if file.name != _LOCK:
            file.unlink()
