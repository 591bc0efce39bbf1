"""Objects in a bucket of Google Cloud Storage (gs://).

An object is whole or absent under its name, so it is written directly. Listings are never cached.
"""

import contextlib
import hashlib
import io
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from etils import epath

from flowhn_jax.storage.place import Place
from flowhn_jax.storage.reader import ObjectReader
from flowhn_jax.storage.requests import client, prepare_packages, repeated
from flowhn_jax.utils.text import short_path

_SCHEME = "gs://"
_BLOCK = 8 * 2**20  # bytes that an open file reads at a time
_TIMEOUT = 60.0  # seconds for one answer
_NO_RETRY: Any = None  # `repeated` does it


class BucketPlace(Place):
    """An object of a bucket, or all objects whose names begin with a folder's name."""

    is_remote = True
    checksum_kind = "crc32c"

    def __init__(self, bucket: str, key: str):
        """Name the object `key`, without slashes at its ends, of a bucket."""
        self._bucket, self._key = bucket, key

    @classmethod
    def parse(cls, text: str) -> "BucketPlace":
        """Return the place of 'gs://bucket/name'.

        Raises:
          ValueError: the name has no bucket or contains '..', or a package is missing.
        """
        prepare_packages()
        bucket, *parts = text.removeprefix(_SCHEME).split("/")
        if not bucket or ".." in parts:
            raise ValueError(
                f"a path in a bucket must be gs://BUCKET/NAME without '..'; got {short_path(text)}."
            )
        return cls(bucket, "/".join(part for part in parts if part not in ("", ".")))

    def __str__(self) -> str:
        return f"{_SCHEME}{self._bucket}/{self._key}".rstrip("/")

    def __truediv__(self, name: str) -> "BucketPlace":
        return BucketPlace.parse(f"{self}/{name}")

    @property
    def name(self) -> str:
        """See Place."""
        return self._key.rpartition("/")[2]

    @property
    def parent(self) -> "BucketPlace":
        """See Place."""
        return BucketPlace(self._bucket, self._key.rpartition("/")[0])

    def local(self) -> pathlib.Path:
        """See Place."""
        raise ValueError(f"a local path is needed here; got {str(self)!r}.")

    def epath(self) -> epath.Path:
        """See Place."""
        return epath.Path(str(self))

    def kvstore(self) -> dict[str, str]:
        """See Place."""
        return {"driver": "gcs", "bucket": self._bucket, "path": self._below}

    def absolute(self) -> "BucketPlace":
        """See Place."""
        return self

    @property
    def _below(self) -> str:
        """Beginning of the names of the objects in this folder."""
        return f"{self._key}/" if self._key else ""

    def blob(self) -> Any:
        """Return the client's handle of the object."""
        return client().bucket(self._bucket).blob(self._key)

    def is_file(self) -> bool:
        """See Place."""
        if not self._key:
            return False
        return repeated(
            f"finding {self}", lambda: self.blob().exists(timeout=_TIMEOUT, retry=_NO_RETRY)
        )

    def is_dir(self) -> bool:
        """See Place."""
        return bool(self._listing(max_results=1)[0])

    def size(self) -> int:
        """See Place."""
        return self._loaded_blob().size

    def _loaded_blob(self) -> Any:
        """Return the client's handle of the object, with its properties."""

        def load() -> Any:
            blob = self.blob()
            blob.reload(timeout=_TIMEOUT, retry=_NO_RETRY)
            return blob

        return repeated(f"finding {self}", load)

    def read(self) -> bytes:
        """See Place."""
        return repeated(
            f"reading {self}",
            lambda: self.blob().download_as_bytes(timeout=_TIMEOUT, retry=_NO_RETRY),
        )

    def open(self) -> BinaryIO:
        """See Place."""
        reader = ObjectReader(str(self), self._loaded_blob(), _TIMEOUT)
        return cast(BinaryIO, io.BufferedReader(reader, _BLOCK))

    def write_whole(self, content: str | bytes) -> None:
        """See Place."""
        data = content.encode() if isinstance(content, str) else content
        repeated(
            f"writing {self}",
            lambda: self.blob().upload_from_string(
                data, "application/octet-stream", timeout=_TIMEOUT, retry=_NO_RETRY
            ),
        )

    def write(self, content: str | bytes) -> None:
        """See Place."""
        self.write_whole(content)

    @contextlib.contextmanager
    def writing(self) -> Iterator[pathlib.Path]:
        """See Place."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / self.name
            path.touch()
            yield path
            self.copy_from(path)

    @contextlib.contextmanager
    def fetched(self) -> Iterator[pathlib.Path]:
        """See Place."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / self.name
            self.copy_to(path)
            yield path

    def copy_from(self, source: pathlib.Path) -> None:
        """See Place."""
        repeated(
            f"writing {self}",
            lambda: self.blob().upload_from_filename(
                str(source), "application/octet-stream", timeout=_TIMEOUT, retry=_NO_RETRY
            ),
        )

    def copy_to(self, target: pathlib.Path) -> None:
        """Download the object into a local file; its checksum is verified by the client."""
        repeated(
            f"reading {self}",
            lambda: self.blob().download_to_filename(
                str(target), timeout=_TIMEOUT, retry=_NO_RETRY
            ),
        )

    def children(self) -> list[Place]:
        """See Place."""
        blobs, folders = self._listing(delimiter="/")
        keys = {blob.name for blob in blobs} | {name.rstrip("/") for name in folders}
        return [BucketPlace(self._bucket, key) for key in sorted(keys) if key != self._below]

    def walk(self) -> "Iterator[tuple[str, BucketPlace]]":
        """See Place."""
        for blob in self._listed():
            yield blob.name[len(self._below) :], BucketPlace(self._bucket, blob.name)

    def checksums(
        self, parts: str | tuple[str, ...] = "", kind: str | None = None
    ) -> dict[str, str]:
        """See Place."""
        prefix = self._below + (parts if isinstance(parts, str) else "")
        found = {blob.name[len(self._below) :]: blob for blob in self._listed(prefix=prefix)}
        found = {name: blob for name, blob in found.items() if name.startswith(parts)}
        if kind == "sha256":
            return {name: hashlib.sha256((self / name).read()).hexdigest() for name in found}
        return {name: f"{blob.size}:{blob.crc32c}" for name, blob in found.items()}

    def irregular(self) -> None:
        """See Place."""

    def sync(self) -> None:
        """See Place."""

    def sync_tree(self) -> None:
        """See Place."""

    def check_own_file(self) -> None:
        """See Place."""

    def _listed(self, **options: Any) -> list[Any]:
        """Return the objects below, sorted by name, without the empty ones that name a folder."""
        return [blob for blob in self._listing(**options)[0] if not blob.name.endswith("/")]

    def _listing(self, **options: Any) -> tuple[list[Any], list[str]]:
        def load() -> tuple[list[Any], list[str]]:
            found = client().list_blobs(
                self._bucket,
                **{"prefix": self._below, "timeout": _TIMEOUT, "retry": _NO_RETRY, **options},
            )
            return list(found), list(found.prefixes)

        return repeated(f"listing {self}", load)

    def make_folder(self) -> None:
        """See Place."""

    def remove(self) -> None:
        """See Place."""
        with contextlib.suppress(FileNotFoundError):
            repeated(
                f"removing {self}",
                lambda: self.blob().delete(timeout=_TIMEOUT, retry=_NO_RETRY),
            )

    def rename(self, target: Place, mark: str) -> None:
        """See Place."""
        assert isinstance(target, BucketPlace)
        for name, place in self.walk():
            place._copy_to_object(target / name)
        self.remove_tree(mark)

    def _copy_to_object(self, target: "BucketPlace") -> None:
        """Copy the object within the store."""

        def copy() -> None:
            client().bucket(self._bucket).copy_blob(
                self.blob(),
                client().bucket(target._bucket),
                target._key,
                timeout=_TIMEOUT,
                retry=_NO_RETRY,
            )

        repeated(f"copying {self}", copy)

    def remove_tree(self, mark: str | None = None) -> None:
        """See Place."""
        if mark is not None:
            (self / mark).remove()
        for _, place in self.walk():
            place.remove()
