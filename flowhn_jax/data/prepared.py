"""A prepared set: token windows in ArrayRecord shards, and an index.json that describes them.

A record is one window: N+1 tokens and then their N+1 segment ids (`packing.Packer`), both
little-endian, with the data types that the index names.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import pathlib
from typing import Any, Self, SupportsIndex

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from flowhn_jax.data import shard_cache
from flowhn_jax.data.config import CACHE_AUTO
from flowhn_jax.data.shards import Shard, unsigned_dtype
from flowhn_jax.data.tokenizer import Tokenizer, load_tokenizer
from flowhn_jax.storage import AnyPath, Place, place
from flowhn_jax.utils import json_text, typed
from flowhn_jax.utils.limits import MAX_POSITIONS
from flowhn_jax.utils.text import short_repr

FORMAT = "flowhn token windows"
VERSION = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Split:
    """The training or the validation split.

    Attributes:
      windows: the number of records in all shards.
      tokens: the number of targets: the documents' tokens and one end-of-text for each.
      bytes: the UTF-8 bytes of the documents.
      documents: the number of documents.
      shards: the files, in order.
    """

    windows: int
    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]


class Windows:
    """Random access to the windows of a split: a data source for Grain."""

    def __init__(self, prepared: "PreparedSet", split: str):
        self._prepared = prepared
        self._split = split
        try:
            self._records = ArrayRecordDataSource(prepared.shard_paths(split))
        except RuntimeError as error:
            found = "cannot be read" if prepared.folder.is_remote else "is damaged"
            raise ValueError(f"The {split} split in {prepared.folder} {found}: {error}.") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Return the tokens and segment_ids of a window, int32 [N+1] each.

        Raises:
          IndexError: there is no such window.
          ValueError: its record is damaged.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"The window must be from 0 to {len(self) - 1}; got {index}.")
        length, prepared = self._prepared.context + 1, self._prepared
        try:
            record = self._records[index]
            boundary = length * np.dtype(prepared.token_dtype).itemsize
            tokens = np.frombuffer(record[:boundary], prepared.token_dtype)
            segment_ids = np.frombuffer(record[boundary:], prepared.segment_dtype)
            if len(tokens) != length or len(segment_ids) != length:
                raise RuntimeError(
                    f"its {len(record)} bytes do not hold {length} tokens and segment ids"
                )
            if tokens.max() >= prepared.vocab_size:
                raise RuntimeError(
                    f"it has token id {tokens.max()}, but the vocabulary size is "
                    f"{prepared.vocab_size}"
                )
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"Window {index} of the {self._split} split in {prepared.folder} is damaged: "
                f"{error}."
            ) from error
        return {
            "tokens": tokens.astype(np.int32),
            "segment_ids": segment_ids.astype(np.int32),
        }


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A prepared set, local or in a bucket.

    Attributes:
      folder: the folder with its files.
      source: the specification of the source it was prepared from.
      request: the arguments that determine the set; equal requests give equal sets.
      tokenizer_spec, tokenizer_fingerprint, vocab_size, eot_id, eot_token, bos_token: the
        tokenizer's attributes.
      first_token: what each document begins with, 'eot' or 'bos'.
      context: N; windows have N+1 tokens.
      token_dtype, segment_dtype: the data types in the records, in NumPy's notation.
      splits: the splits 'train' and 'validation'.
      cache: where this host keeps a copy of the shards, as `data.cache`.
    """

    folder: Place
    source: str
    request: dict[str, Any]
    tokenizer_spec: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot_id: int
    eot_token: str | None
    context: int
    token_dtype: str
    segment_dtype: str
    splits: dict[str, Split]
    first_token: str = "eot"  # of the sets that do not record it
    bos_token: str | None = None
    cache: str = CACHE_AUTO

    @classmethod
    def open(cls, folder: AnyPath, cache: str = CACHE_AUTO) -> Self:
        """Open a set, checking that all shards exist and have their recorded size.

        Args:
          folder: the set.
          cache: see the attribute.

        Raises:
          FileNotFoundError: the folder does not exist.
          ValueError: the folder is not a prepared set of this version, or it is damaged.
        """
        folder = place(folder)
        if not folder.exists():
            several = " (several sets need weights: A:0.7,B:0.3)" if "," in str(folder) else ""
            raise FileNotFoundError(
                f"The folder {folder} of prepared data does not exist{several}; prepare it by "
                f"python -m flowhn_jax.data.prepare --source=... --tokenizer=... --out={folder}"
            )
        fields = read_index(folder)
        if (version := fields.pop("version", None)) != VERSION:
            raise ValueError(
                f"version in {folder / INDEX} must be {VERSION}; got {short_repr(version)}. "
                "Prepare the data again."
            )
        try:
            prepared = typed.build(cls, fields | {"folder": folder, "cache": cache}, what="key")
            prepared._check()
        except ValueError as error:
            raise ValueError(
                f"{folder / INDEX} does not describe a prepared set: {error}"
            ) from error
        prepared._check_files()
        return prepared

    def windows(self, split: str) -> Windows:
        """Return the windows of 'train' or 'validation', in the order of the documents."""
        return Windows(self, split)

    def load(self, *splits: str) -> None:
        """Copy the shards of these splits to this host's cache, if it has one, once.

        Raises:
          ValueError, OSError: see `shard_cache.load`.
        """
        cache = self._cache_folder
        for split in splits:
            if cache is not None and split not in self._loaded:
                shard_cache.load(self.folder, self.splits[split].shards, cache)
                self._loaded.add(split)

    @functools.cached_property
    def _loaded(self) -> set[str]:
        return set()

    @functools.cached_property
    def _cache_folder(self) -> pathlib.Path | None:
        return shard_cache.cache_folder(self.cache, self.folder, self.fingerprint)

    def shard_paths(self, split: str) -> list[str]:
        """Return where the shards of a split can be read: in the cache if there is one.

        Raises:
          ValueError, OSError: a shard is missing or damaged, or cannot be copied.
        """
        self.load(split)
        shards = self.splits[split].shards
        folder = place(self._cache_folder or self.folder)
        if not folder.is_remote:
            # Check again: the files may have changed, and reading a pipe would never end.
            for shard in shards:
                shard.check((folder / shard.file).local())
        return [str(folder / shard.file) for shard in shards]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The set's tokenizer, loaded from the set's own copy of its file.

        Raises:
          ValueError: the file is not the one that the set was prepared with.
        """
        if self.tokenizer_spec == "bytes":
            return load_tokenizer("bytes")
        tokenizer = load_tokenizer(
            str(self.folder / TOKENIZER), self.eot_token, self.bos_token, self.first_token
        )
        recorded = self.tokenizer_fingerprint, self.vocab_size, self.eot_id
        if (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id) != recorded:
            raise ValueError(
                f"{self.folder / TOKENIZER} is not the tokenizer that the set was prepared with."
            )
        return tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """A string that identifies the set's windows, in whichever folder they are."""
        hashes = [shard.sha256 for shard in self._shards()]
        content = json.dumps([self.tokenizer_fingerprint, self.context, hashes])
        return hashlib.sha256(content.encode()).hexdigest()

    def verify(self) -> None:
        """Check the whole content of every local shard; a bucket checks its objects by itself.

        Raises:
          ValueError: a shard's content differs from what was written.
        """
        if not self.folder.is_remote:
            for shard in self._shards():
                shard.verify((self.folder / shard.file).local())

    def write_index(self) -> None:
        """Write index.json, which makes the folder a prepared set."""
        fields = dataclasses.asdict(self)
        del fields["folder"], fields["cache"]
        content = json.dumps({"format": FORMAT, "version": VERSION} | fields, indent=2)
        (self.folder / INDEX).write_whole(content)

    def _check(self) -> None:
        """Raise ValueError if a field has a value that no set can have."""
        for name, is_good in (
            ("splits", set(self.splits) == {"train", "validation"}),
            ("context", 1 <= self.context <= MAX_POSITIONS),
            ("vocab_size", 1 <= self.vocab_size <= 1 << 32),
            ("eot_id", 0 <= self.eot_id < self.vocab_size),
            ("first_token", self.first_token in ("eot", "bos")),
            ("bos_token", self.bos_token is not None or self.first_token == "eot"),
            ("token_dtype", self.token_dtype == unsigned_dtype(self.vocab_size)),
            ("segment_dtype", self.segment_dtype == unsigned_dtype(self.context + 2)),
        ):
            if not is_good:
                raise ValueError(f"{name} cannot be {short_repr(getattr(self, name))}")
        for name, split in self.splits.items():
            counts = split.windows, split.tokens, split.bytes, split.documents
            if min(counts) < 1 or sum(shard.records for shard in split.shards) != split.windows:
                raise ValueError(f"the counts of the {name} split are inconsistent")

    def _check_files(self) -> None:
        """Raise ValueError if a shard is missing or does not have its recorded size."""
        for shard in self._shards():
            shard.check_name(self.folder)
        if not self.folder.is_remote:
            for shard in self._shards():
                shard.check((self.folder / shard.file).local())
            return
        found = self.folder.checksums()
        for shard in self._shards():
            size = found[shard.file].partition(":")[0] if shard.file in found else None
            shard.check_size(self.folder / shard.file, None if size is None else int(size))

    def _shards(self) -> list[Shard]:
        return [shard for split in self.splits.values() for shard in split.shards]


def read_index(folder: Place) -> dict[str, Any]:
    """Return the fields of a folder's index of any version.

    Raises:
      ValueError: the folder has no index of a prepared set.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared set: it has no {INDEX}.")
    try:
        fields = json_text.loads(path.read(), INDEX)
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if (
        not isinstance(fields, dict)
        or fields.pop("format", None) != FORMAT
        or not isinstance(fields.get("request"), dict)
    ):
        raise ValueError(f"{path} is not the index of a prepared set.")
    return fields
