"""Files of the local file system."""

import base64
import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from flowhn_jax.storage.place import Place
from flowhn_jax.utils.files import (
    check_own_file,
    sha256,
    sync,
    sync_tree,
    whole_file,
    write_atomically,
)
from flowhn_jax.utils.text import short_path

_BLOCK = 2**20  # bytes


class LocalPlace(Place):
    """A local file or folder."""

    is_remote = False
    checksum_kind = "sha256"

    def __init__(self, path: pathlib.Path):
        """Name a local path."""
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def __truediv__(self, name: str) -> "LocalPlace":
        return LocalPlace(self._path / name)

    @property
    def name(self) -> str:
        """See Place."""
        return self._path.name

    @property
    def parent(self) -> "LocalPlace":
        """See Place."""
        return LocalPlace(self._path.parent)

    def local(self) -> pathlib.Path:
        """See Place."""
        return self._path

    def epath(self) -> epath.Path:
        """See Place."""
        return epath.Path(self._path.absolute())

    def kvstore(self) -> dict[str, str]:
        """See Place."""
        return {"driver": "file", "path": f"{self._path.absolute()}/"}

    def absolute(self) -> "LocalPlace":
        """See Place."""
        return LocalPlace(self._path.absolute())

    def is_file(self) -> bool:
        """See Place."""
        return self._path.is_file()

    def is_dir(self) -> bool:
        """See Place."""
        return self._path.is_dir()

    def exists(self) -> bool:
        """See Place."""
        return self._path.exists()

    def size(self) -> int:
        """See Place."""
        return self._path.stat().st_size

    def read(self) -> bytes:
        """See Place."""
        return self._path.read_bytes()

    def open(self) -> BinaryIO:
        """See Place."""
        return self._path.open("rb")

    def write_whole(self, content: str | bytes) -> None:
        """See Place."""
        write_atomically(self._path, content)

    def write(self, content: str | bytes) -> None:
        """See Place."""
        self._path.write_bytes(content.encode() if isinstance(content, str) else content)

    def writing(self) -> contextlib.AbstractContextManager[pathlib.Path]:
        """See Place."""
        return whole_file(self._path)

    @contextlib.contextmanager
    def fetched(self) -> Iterator[pathlib.Path]:
        """See Place."""
        yield self._path

    def copy_from(self, source: pathlib.Path) -> None:
        """See Place."""
        with whole_file(self._path) as temporary:
            shutil.copyfile(source, temporary)

    def children(self) -> list[Place]:
        """See Place."""
        if not self._path.is_dir():
            return []
        return [LocalPlace(path) for path in sorted(self._path.iterdir())]

    def walk(self) -> Iterator[tuple[str, Place]]:
        """See Place."""
        for path in sorted(path for path in self._path.rglob("*") if path.is_file()):
            yield path.relative_to(self._path).as_posix(), LocalPlace(path)

    def checksums(
        self, parts: str | tuple[str, ...] = "", kind: str | None = None
    ) -> dict[str, str]:
        """See Place."""
        function = _crc32c if kind == "crc32c" else sha256
        return {
            name: function(place.local()) for name, place in self.walk() if name.startswith(parts)
        }

    def irregular(self) -> str | None:
        """See Place."""
        for path in self._path.rglob("*"):
            if not (path.is_file() or path.is_dir()):
                return str(path.relative_to(self._path))
        return None

    def sync(self) -> None:
        """See Place."""
        sync(self._path)

    def sync_tree(self) -> None:
        """See Place."""
        sync_tree(self._path)

    def check_own_file(self) -> None:
        """See Place."""
        check_own_file(self._path)

    def make_folder(self) -> None:
        """See Place."""
        self._path.mkdir(parents=True, exist_ok=True)

    def rename(self, target: Place, mark: str) -> None:
        """See Place."""
        self._path.rename(target.local())

    def remove(self) -> None:
        """See Place."""
        self._path.unlink(missing_ok=True)

    def remove_tree(self, mark: str | None = None) -> None:
        """See Place."""
        shutil.rmtree(self._path, ignore_errors=not self._path.exists())


def _crc32c(path: pathlib.Path) -> str:
    """Return 'SIZE:CRC32C' of a file, as a bucket lists it.

    Raises:
      ValueError: the package for it is missing.
    """
    try:
        import google_crc32c
    except ImportError as error:
        raise ValueError(
            f"checking {short_path(path)}, which was copied from a bucket, needs the package "
            "google-crc32c: pip install google-crc32c"
        ) from error
    size, digest = 0, google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return f"{size}:{base64.b64encode(digest.digest()).decode()}"
