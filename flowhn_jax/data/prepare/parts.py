"""Parts: the token ids of the documents, as workers write them before they are packed.

Part k holds the k-th group of chunks of all documents. A part appears under its name when it is
complete, so a preparation that was killed continues with the parts that are missing. With
`--shard=I/N`, shard I of N makes every N-th part.
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flowhn_jax.data import document, encoding
from flowhn_jax.data.encoding import Chunk, encode, groups
from flowhn_jax.data.prepare.holdout import with_holdout
from flowhn_jax.data.prepare.throughput import Throughput
from flowhn_jax.data.prepare.workers import Workers
from flowhn_jax.data.shards import unsigned_dtype
from flowhn_jax.data.sources import Source
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.utils import json_text
from flowhn_jax.utils.files import whole_file, write_atomically

_VERSION = 1  # of the parts' format
_REQUEST, COMPLETE = "request.json", "complete.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """The ids of consecutive chunks, which may begin or end within a document.

    Attributes:
      ids: the ids of all chunks.
      lengths: the number of ids of each chunk.
      sizes: the bytes of each chunk's text.
      starts: whether each chunk is the first one of its document.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray


_FIELDS = tuple(field.name for field in dataclasses.fields(Part))


@dataclasses.dataclass(frozen=True)
class PartList(Sequence[Part]):
    """All parts of a set, in order, which are read when they are needed.

    Attributes:
      folders: the folders of all shards of the preparation, in order.
      total: the number of parts.
    """

    folders: tuple[pathlib.Path, ...]
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Part:
        return Part(*self._read(number, _FIELDS))

    def without_ids(self) -> Iterator[Part]:
        """Yield all parts without reading their ids."""
        for number in range(self.total):
            yield Part(np.empty(0, np.int32), *self._read(number, _FIELDS[1:]))

    def _read(self, number: int, names: Sequence[str]) -> list[np.ndarray]:
        path = _path(self.folders[number % len(self.folders)], number)
        try:
            with np.load(path) as arrays:
                return [arrays[name] for name in names]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}); remove {path.parent}, and prepare that "
                "shard again."
            ) from error


def _path(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:08d}.npz"


def write_parts(
    source: Source,
    tokenizer: Tokenizer,
    fraction: float,
    folder: pathlib.Path,
    workers: Workers[Tokenizer],
    shard: tuple[int, int],
) -> int:
    """Write the parts of this shard that are missing, and return the number of all shards' parts.

    Args:
      source: the documents.
      tokenizer: the tokenizer.
      fraction: the share of the documents to hold out.
      folder: the folder for the parts.
      workers: the processes that encode.
      shard: I and N.

    Raises:
      ValueError, OSError: see `preparation.prepare`.
    """
    index, count = shard
    total = 0
    with Throughput(source.size) as throughput:
        documents = with_holdout(source.read(throughput.add), fraction)

        def tasks() -> Iterator[tuple[list[Chunk], pathlib.Path]]:
            nonlocal total
            for number, group in enumerate(groups(tokenizer, documents)):
                total += 1
                path = _path(folder, number)
                if number % count == index and not path.exists():
                    throughput.begin()
                    yield group, path

        try:
            for _ in workers.map(_write_part, tasks()):
                throughput.end()
        except (FileNotFoundError, ValueError):
            source.check_unchanged()  # a file that changes may look damaged
            raise
    source.check_unchanged()
    return total


def _write_part(tokenizer: Tokenizer, group: list[Chunk], path: pathlib.Path) -> None:
    ids = encode(tokenizer, group)
    part = Part(
        np.concatenate(ids).astype(unsigned_dtype(tokenizer.vocab_size)),
        np.array([len(each) for each in ids], np.int64),
        np.array([len(chunk.text) for chunk in group], np.int64),
        np.array([chunk.starts_document for chunk in group], bool),
    )
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: getattr(part, name) for name in _FIELDS})


def keep_parts_of(folder: pathlib.Path, request: dict[str, Any], is_reproducible: bool) -> None:
    """Remove the parts in a folder unless they belong to this request.

    Args:
      folder: the folder of a shard's parts.
      request: the request of the set.
      is_reproducible: whether equal requests read equal documents; otherwise no part is kept.
    """
    wanted = _with_groups(request)
    if not is_reproducible or _read(folder / _REQUEST) != wanted:
        remove_parts(folder)
        write_atomically(folder / _REQUEST, json.dumps(wanted))


def remove_parts(folder: pathlib.Path) -> None:
    """Remove what this module wrote to a folder; the request, which identifies it, last."""
    for path in [*sorted(folder.glob("*.npz*")), folder / COMPLETE, folder / _REQUEST]:
        path.unlink(missing_ok=True)


def mark_complete(folder: pathlib.Path, total: int) -> None:
    """Record that all parts of a shard are in its folder, and the number of all shards' parts."""
    write_atomically(folder / COMPLETE, json.dumps({"parts": total}))


def count_if_complete(folder: pathlib.Path, request: dict[str, Any]) -> int | None:
    """Return the number of all shards' parts if this shard's are complete, and None if not.

    Raises:
      ValueError: the parts belong to another request.
    """
    complete = _read(folder / COMPLETE)
    if not isinstance(complete, dict) or not isinstance(complete.get("parts"), int):
        return None
    found, wanted = _read(folder / _REQUEST) or {}, _with_groups(request)
    if found != wanted:
        keys = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise ValueError(
            f"All shards of a set must be prepared from the same source with the same options; "
            f"{folder} differs in {keys}. Remove it, and prepare that shard again."
        )
    return complete["parts"]


def _with_groups(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with what divides the text into parts, which a new version may change."""
    return request | {"version": _VERSION, "groups": [encoding.GROUP_BYTES, document.CHUNK_BYTES]}


def _read(path: pathlib.Path) -> Any:
    """Return the JSON value in a file; None if it is absent or torn."""
    try:
        return json_text.loads(path.read_bytes(), str(path))
    except (FileNotFoundError, ValueError):
        return None
