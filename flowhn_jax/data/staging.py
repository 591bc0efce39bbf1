"""Staging: writing a folder under a temporary name, so that under its own it is always complete."""

import contextlib
import os
import pathlib
import shutil
import stat
import sys
from collections.abc import Callable, Iterator

from flowhn_jax.utils.files import sync
from flowhn_jax.utils.lock import LOCK_FILE, wait_for_lock


@contextlib.contextmanager
def staging_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield an empty, locked folder next to `out`, to be filled with files and then published.

    A second process that wants the same folder waits for the lock. The lock is released when its
    process ends, even if it is killed; what such a process wrote is then removed by the next one.
    If the body does not call `publish`, the folder is removed.

    Raises:
      ValueError: see `kept_folder`.
    """
    with kept_folder(out.with_name(f".{out.name}.unfinished"), out) as folder:
        _remove_files(folder)
        created = folder.stat()
        try:
            yield folder
        finally:
            if _is_same(folder, created):  # otherwise it was published
                _remove_files(folder)


@contextlib.contextmanager
def kept_folder(folder: pathlib.Path, out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a locked folder for the preparation of `out`, with the files that were left in it.

    A second process that wants the same folder waits for the lock. At the end the folder is
    removed if it is empty.

    Raises:
      ValueError: the folder's name is taken by something else, or the folder holds something else
        than files. A symbolic link, for example, is not followed, so that no files outside are
        removed or overwritten.
    """

    def report_waiting() -> None:
        print(f"Waiting for another process that prepares {out}.", file=sys.stderr)

    while True:
        _check_kind(folder, stat.S_ISDIR)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                is_owner = stack.enter_context(wait_for_lock(folder, report_waiting))
            except FileNotFoundError:  # the owner has just removed or published the folder
                continue
            if not is_owner:
                continue
            for file in folder.iterdir():
                _check_kind(file, stat.S_ISREG)
            created = folder.stat()
            try:
                yield folder
            finally:
                if _is_same(folder, created):
                    remove_if_empty(folder)
            return


def remove_if_empty(folder: pathlib.Path) -> None:
    """Remove a folder of `kept_folder` if it is empty but for the lock."""
    if folder.is_dir() and all(file.name == LOCK_FILE for file in folder.iterdir()):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the next owner has written to it
            folder.rmdir()


def publish(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Rename `folder`, the complete `staging_folder(out)`, to `out`.

    An existing `out` is removed: a set that is being replaced, or an empty folder.
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
    (out / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_kind(path: pathlib.Path, is_kind: Callable[[int], bool]) -> None:
    """Raise ValueError if a path exists and is of another kind than this module creates."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not is_kind(mode):
        raise ValueError(
            f"{path} was not created by this program; remove it, or choose another --out."
        )


def _is_same(folder: pathlib.Path, status: os.stat_result) -> bool:
    """Return whether a folder is still the one with this status."""
    return folder.exists() and os.path.samestat(folder.stat(), status)


def _remove_files(folder: pathlib.Path) -> None:
    """Remove the folder's files, except the lock."""
    for file in folder.iterdir():
        _check_kind(file, stat.S_ISREG)
        if file.name != LOCK_FILE:
            file.unlink()
