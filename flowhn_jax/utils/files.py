"""A file that is whole or absent under its name, also after a power cut."""

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield where to write what then gets the name `path`, in place of a file or link of that name.

    Content and name are on the disk when the context ends. The file's mode is that of any new one,
    whatever the library that writes it would give.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # one that was left, or a link to something else
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    yield temporary
    temporary.chmod(mode)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: pathlib.Path) -> None:
    """Wait until all of a folder is on the disk: files, folders and their names."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(pathlib.Path(parent, name))
        sync(pathlib.Path(parent))


def check_own_file(path: pathlib.Path) -> None:
    """Raise ValueError where a name is taken by a link, or by anything else than a file."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        found = "a link" if path.is_symlink() else "no file"
        raise ValueError(
            f"{str(path)!r} must be a file that the run made; it is {found}. Remove it, or give "
            "another --workdir."
        )
