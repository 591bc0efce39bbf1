"""Atomic writes and hashes: a file is whole or absent under its name, also after a power cut."""

import contextlib
import hashlib
import os
import pathlib
import stat
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path; its file replaces `path`, atomically, when the context ends.

    Content and name are on the disk by then. A link of that name is replaced, not followed. The
    file's mode is that of any new file, whatever the library that writes it would choose. After an
    error in the context, `path` is unchanged.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed process, or a link to something else
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    yield temporary
    temporary.chmod(mode)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a whole file as `whole_file` does; text is written as UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Raise ValueError if a name is taken by a link, or by anything else that is not a file."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        found = "a link" if path.is_symlink() else "not a file"
        raise ValueError(
            f"{str(path)!r} must be a file that the run made; it is {found}. Remove it, or type "
            "another --workdir."
        )
