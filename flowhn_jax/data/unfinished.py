"""A folder that is complete or absent: written under another name, renamed at the very end."""

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
def unfinished_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder beside `out`, to be filled with files and given to `publish`.

    Whoever holds the folder's lock owns it; a second process that wants it waits. The lock ends
    with its process, however that ends, so that what a killed one left behind is known to be
    nobody's and is removed.

    Raises:
      ValueError: something of another kind has the folder's name, or is in it: a symbolic link,
        say, behind which files would be removed and written that are not ours.
    """
    folder = out.with_name(f".{out.name}.unfinished")

    def wait() -> None:
        print(f"Waiting for another process that prepares {out}.", file=sys.stderr)

    while True:
        _check_kind(folder, stat.S_ISDIR)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                is_ours = stack.enter_context(wait_for_lock(folder, wait))
            except FileNotFoundError:  # the owner has just removed or published the folder
                continue
            if not is_ours:
                continue
            _clear(folder)
            created = folder.stat()
            try:
                yield folder
            finally:
                if _is(folder, created):  # else it has become `out`
                    _clear(folder)
                    (folder / LOCK_FILE).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # the next owner was quick
                        folder.rmdir()
            return


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
    (out / LOCK_FILE).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_kind(path: pathlib.Path, is_kind: Callable[[int], bool]) -> None:
    """Raises ValueError where there is something else than this code makes, or a link to it."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not is_kind(mode):
        raise ValueError(f"{path} was made by something else; remove it, or choose another name.")


def _is(folder: pathlib.Path, status: os.stat_result) -> bool:
    """Whether the folder of that name is still the one of which this is the status."""
    return folder.exists() and os.path.samestat(folder.stat(), status)


def _clear(folder: pathlib.Path) -> None:
    for file in folder.iterdir():
        _check_kind(file, stat.S_ISREG)
        if file.name != LOCK_FILE:
            file.unlink()
