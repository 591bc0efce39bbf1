"""What every kind of storage offers: a name, and what can be done with the file of this name."""

import abc
import contextlib
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


class Place(abc.ABC):
    """The name of a file or a folder, as pathlib.Path; nothing needs to exist there.

    It is no os.PathLike: `pathlib.Path("gs://bucket/run")` would silently be the local folder
    `gs:/bucket/run`. A local place has the method `local`.
    """

    is_remote: bool  # whether it lies in a bucket
    checksum_kind: str  # of `checksums`

    @abc.abstractmethod
    def __str__(self) -> str:
        """Return the name as it was given, e.g. 'runs/mine' or 'gs://bucket/runs/mine'."""

    @abc.abstractmethod
    def __truediv__(self, name: str) -> "Place":
        """Return the place of this name below."""

    def __repr__(self) -> str:
        return repr(str(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Last part of the name."""

    @property
    def suffix(self) -> str:
        """End of the name from its last dot on, such as '.jsonl'; '' if it has none."""
        return pathlib.PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Name without its suffix."""
        return self.name.removesuffix(self.suffix)

    @property
    @abc.abstractmethod
    def parent(self) -> "Place":
        """The folder that it lies in."""

    @abc.abstractmethod
    def local(self) -> pathlib.Path:
        """Return the local path; ValueError if it is not local."""

    @abc.abstractmethod
    def epath(self) -> epath.Path:
        """Return the absolute path as Orbax and Grain take it."""

    @abc.abstractmethod
    def kvstore(self) -> dict[str, str]:
        """Return TensorStore's spec of the key-value store of this folder."""

    @abc.abstractmethod
    def absolute(self) -> "Place":
        """Return the place with its absolute name; links are not followed."""

    @abc.abstractmethod
    def is_file(self) -> bool:
        """Return whether there is a file; False for a folder."""

    @abc.abstractmethod
    def is_dir(self) -> bool:
        """Return whether there is a folder; in a bucket: whether anything lies below."""

    def exists(self) -> bool:
        """Return whether there is a file or a folder."""
        return self.is_file() or self.is_dir()

    @abc.abstractmethod
    def size(self) -> int:
        """Return the bytes of a file."""

    @abc.abstractmethod
    def read(self) -> bytes:
        """Return the content of a file; FileNotFoundError if there is none."""

    def read_text(self) -> str:
        """Return the content of a file in UTF-8."""
        return self.read().decode()

    @abc.abstractmethod
    def open(self) -> BinaryIO:
        """Open a file to read from any position; it is never read as a whole."""

    @abc.abstractmethod
    def write_whole(self, content: str | bytes) -> None:
        """Write or replace a file atomically; text is written as UTF-8.

        Locally its content and name are on the disk when the call returns.
        """

    @abc.abstractmethod
    def write(self, content: str | bytes) -> None:
        """Write a result as `write_whole`, but through an existing local device, pipe or link."""

    @abc.abstractmethod
    def writing(self) -> contextlib.AbstractContextManager[pathlib.Path]:
        """Yield a local path for a library to write; its file replaces this one, atomically.

        After an error in the context nothing has changed here.
        """

    @abc.abstractmethod
    def fetched(self) -> contextlib.AbstractContextManager[pathlib.Path]:
        """Yield a local path with this file's content: its own, or that of a temporary copy."""

    @abc.abstractmethod
    def copy_from(self, source: pathlib.Path) -> None:
        """Write or replace this file atomically with the content of a local one."""

    @abc.abstractmethod
    def children(self) -> "list[Place]":
        """Return the files and folders directly in a folder, sorted by name; [] without one."""

    @abc.abstractmethod
    def walk(self) -> "Iterator[tuple[str, Place]]":
        """Yield all files below with their relative names, sorted; nothing without a folder."""

    @abc.abstractmethod
    def checksums(
        self, parts: str | tuple[str, ...] = "", kind: str | None = None
    ) -> dict[str, str]:
        """Return a checksum of each file below whose relative name begins with `parts`.

        Args:
          parts: beginnings of relative names.
          kind: 'sha256', of the content read; or 'crc32c', as 'SIZE:CRC32C', which a bucket lists
            so that nothing is downloaded. None: `checksum_kind`.
        """

    @abc.abstractmethod
    def irregular(self) -> str | None:
        """Return the relative name of something below that is neither file nor folder, if any.

        An example is a pipe, whose reading would never end.
        """

    @abc.abstractmethod
    def sync(self) -> None:
        """Wait until a file, or a folder's list of names, is on the disk; in a bucket it is."""

    @abc.abstractmethod
    def sync_tree(self) -> None:
        """Wait until all of a folder is on the disk; in a bucket it is."""

    @abc.abstractmethod
    def check_own_file(self) -> None:
        """Raise ValueError if the name is taken by a link or by anything else but a file."""

    @abc.abstractmethod
    def make_folder(self) -> None:
        """Create a folder and its parents if need be; in a bucket there are none to create."""

    @abc.abstractmethod
    def rename(self, target: "Place", mark: str) -> None:
        """Rename a folder to a free name in the same storage.

        In a bucket it is copied, and then removed as by `remove_tree` with `mark`.
        """

    @abc.abstractmethod
    def remove(self) -> None:
        """Remove a file, if it exists."""

    @abc.abstractmethod
    def remove_tree(self, mark: str | None = None) -> None:
        """Remove a folder with all that is in it, if it exists.

        Args:
          mark: relative name of the file without which the folder counts as incomplete. A bucket
            has no atomic removal, so this file is the first to go.
        """
