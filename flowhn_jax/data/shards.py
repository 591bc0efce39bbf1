"""Shards: the ArrayRecord files of a prepared set."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]  an extension without stubs
)

from flowhn_jax.storage import Place
from flowhn_jax.utils.files import sha256, sync
from flowhn_jax.utils.text import short_repr

SHARD_BYTES = 1 << 28  # of windows in one shard, before compression
_MAX_NAME = 255  # characters of a file's name


def unsigned_dtype(bound: int) -> str:
    """Return the narrower of uint16 and uint32 that holds all numbers below `bound`."""
    return "<u2" if bound <= 1 << 16 else "<u4"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file.

    Attributes:
      file: its name.
      records: the number of records, one per window.
      bytes: its size.
      sha256: the hash of its content.
    """

    file: str
    records: int
    bytes: int
    sha256: str

    def check_name(self, folder: Place) -> None:
        """Raise ValueError if the name leads out of the folder of the set."""
        if pathlib.PurePath(self.file).name != self.file or len(self.file) > _MAX_NAME:
            raise ValueError(
                f"The index of {folder} must name only files in this folder; "
                f"got {short_repr(self.file)}."
            )

    def check_size(self, path: Place | pathlib.Path, size: int | None) -> None:
        """Raise ValueError if the file at `path` has not the recorded size; None: it is absent."""
        if size is None:
            raise ValueError(f"{path} is missing, but the index names it.")
        if size != self.bytes:
            raise ValueError(f"{path} has {size} bytes, but {self.bytes} were written.")

    def check(self, path: pathlib.Path) -> None:
        """Check that a local file exists and has the recorded size and number of records.

        Raises:
          ValueError: it does not.
        """
        self.check_size(path, path.stat().st_size if path.is_file() else None)
        try:
            reader = array_record_module.ArrayRecordReader(_utf8_path(path))
            records = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise ValueError(f"{path} is not an ArrayRecord file: {error}") from error
        if records != self.records:
            raise ValueError(f"{path} has {records} windows, but {self.records} were written.")

    def verify(self, path: pathlib.Path) -> None:
        """Check the whole content of a local file.

        Raises:
          ValueError: the content differs from what was written.
        """
        if sha256(path) != self.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 has changed.")


class ShardWriter:
    """A writer of the windows of one split into shards.

    Attributes:
      shards: the shards that are complete.
    """

    def __init__(self, folder: pathlib.Path, name: str, token_dtype: str, segment_dtype: str):
        """Make a writer of files NAME-00000.array_record and so on in `folder`."""
        self.shards: list[Shard] = []
        self._folder = folder
        self._name = name
        self._dtypes = token_dtype, segment_dtype
        self._writer: Any = None
        self._path = pathlib.Path()
        self._records = 0
        self._bytes = 0

    def write(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Append windows [W, N+1].

        Raises:
          OSError: they cannot be written, for example because the disk is full.
        """
        columns = (tokens.astype(self._dtypes[0]), segment_ids.astype(self._dtypes[1]))
        for window, segments in zip(*columns, strict=True):
            if self._writer is None:
                self._path = self._folder / f"{self._name}-{len(self.shards):05d}.array_record"
                # Groups of one record, because records are read one by one in random order.
                self._writer = array_record_module.ArrayRecordWriter(
                    _utf8_path(self._path), "group_size:1"
                )
            record = window.tobytes() + segments.tobytes()
            self._call(self._writer.write, record)
            self._records += 1
            self._bytes += len(record)
            if self._bytes + len(record) > SHARD_BYTES:
                self._close_shard()

    def close(self) -> tuple[Shard, ...]:
        """Complete the last shard and return all of them."""
        if self._writer is not None:
            self._close_shard()
        return tuple(self.shards)

    def _close_shard(self) -> None:
        self._call(self._writer.close)
        sync(self._path)
        self.shards.append(
            Shard(self._path.name, self._records, self._path.stat().st_size, sha256(self._path))
        )
        self._writer, self._records, self._bytes = None, 0, 0

    def _call(self, function: Callable, *arguments: Any) -> None:
        try:
            function(*arguments)
        except RuntimeError as error:  # the only kind that the library raises
            raise OSError(f"{self._path} cannot be written: {error}") from error


def _utf8_path(path: pathlib.Path) -> str:
    """Return a path for ArrayRecord; raise ValueError if it is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The path of prepared data must be UTF-8; got {str(path)!r}.") from error
    return str(path)
