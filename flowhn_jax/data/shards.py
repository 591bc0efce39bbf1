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
        """Raise ValueError if a file is absent (size None) or does not have the recorded size."""
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


def windows_per_shard(context: int, token_dtype: str, segment_dtype: str) -> int:
    """Return the number of windows in each shard of a split but the last one."""
    item_sizes = np.dtype(token_dtype).itemsize + np.dtype(segment_dtype).itemsize
    return max(1, SHARD_BYTES // ((context + 1) * item_sizes))


class ShardWriter:
    """A writer of one shard."""

    def __init__(self, path: pathlib.Path, token_dtype: str, segment_dtype: str):
        """Make a writer of the file `path`."""
        self._path = path
        self._dtypes = token_dtype, segment_dtype
        self._records = 0
        # Groups of one record, because records are read one by one in random order.
        self._writer: Any = self._call(
            array_record_module.ArrayRecordWriter, _utf8_path(path), "group_size:1"
        )

    def write(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        """Append windows [W, N+1].

        Raises:
          OSError: they cannot be written, for example because the disk is full.
        """
        columns = (tokens.astype(self._dtypes[0]), segment_ids.astype(self._dtypes[1]))
        for window, segments in zip(*columns, strict=True):
            self._call(self._writer.write, window.tobytes() + segments.tobytes())
            self._records += 1

    def close(self) -> Shard:
        """Complete the shard and return it."""
        self._call(self._writer.close)
        sync(self._path)
        path = self._path
        return Shard(path.name, self._records, path.stat().st_size, sha256(path))

    def _call(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError as error:  # the only kind that the library raises
            raise OSError(f"{self._path} cannot be written: {error}") from error


def _utf8_path(path: pathlib.Path) -> str:
    """Return a path for ArrayRecord; raise ValueError if it is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The path of prepared data must be UTF-8; got {str(path)!r}.") from error
    return str(path)
