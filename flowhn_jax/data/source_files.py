"""The files of a source, and whether they changed while they were read."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flowhn_jax.storage import Place, place


class SourceFile(NamedTuple):
    """A file and what stands for its content.

    Attributes:
      place: the file.
      name: its path relative to the source.
      size: its bytes.
      version: locally its modification time; elsewhere the checksum that the store keeps.
      inode: locally its number on the disk.
    """

    place: Place
    name: str
    size: int
    version: str | int
    inode: int = 0


def file_at(path: Place, name: str) -> SourceFile:
    """Return a file as it is now; `name` is its path relative to the source.

    Raises:
      FileNotFoundError: there is none.
    """
    if path.is_remote:
        checksum = path.parent.checksums(path.name).get(path.name)
        if checksum is None:
            raise FileNotFoundError(f"{path} does not exist.")
        size, _, version = checksum.partition(":")
        return SourceFile(path, name, int(size), version)
    stat = path.local().stat()
    return SourceFile(path, name, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def find_files(folder: Place, is_wanted: Callable[[str], bool]) -> list[SourceFile]:
    """Return the files below a folder whose names are wanted, sorted, without hidden ones."""
    found = _remote(folder) if folder.is_remote else _local(folder)
    wanted = [file for file in found if is_wanted(file.name)]
    return sorted(wanted, key=lambda file: file.name.split("/"))


def _remote(folder: Place) -> Iterator[SourceFile]:
    for name, checksum in folder.checksums().items():
        if not any(part.startswith(".") for part in name.split("/")):
            size, _, version = checksum.partition(":")
            yield SourceFile(folder / name, name, int(size), version)


def _local(folder: Place) -> Iterator[SourceFile]:
    root = folder.local()
    for parent, children, names in os.walk(root):
        children[:] = (child for child in children if not child.startswith("."))
        for name in names:
            path = pathlib.Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield file_at(place(path), path.relative_to(root).as_posix())


class Listing:
    """The files of a source, whose names, sizes and versions stand for their content.

    Attributes:
      files: the files.
      identity: a line of text that changes if the files may have changed.
      size: the bytes of all files.
    """

    def __init__(self, find: Callable[[], list[SourceFile]]):
        """List the files that `find` finds."""
        self._find = find
        self.files = find()
        self.size = sum(file.size for file in self.files)
        lines = (f"{file.name}\t{file.size}\t{file.version}\n" for file in self.files)
        digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
        self.identity = (
            f"{len(self.files)} files, {self.size} bytes, sha256 of their listing {digest}"
        )

    def check_unchanged(self, file: SourceFile) -> None:
        """Raise ValueError if a file is no longer the one that was listed."""
        try:
            is_same = file_at(file.place, file.name) == file
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise _changed(file)

    def check_all_unchanged(self) -> None:
        """Raise ValueError if any file was changed, added or removed."""
        try:
            now = self._find()
        except (ValueError, FileNotFoundError):  # nothing is left
            now = []
        if changed := set(self.files) ^ set(now):
            raise _changed(min(changed, key=lambda file: file.name))


def _changed(file: SourceFile) -> ValueError:
    return ValueError(
        f"{file.place} must not change while it is prepared, but it did; prepare the source again."
    )
