"""Writing the splits of a set: documents to chunks, token ids, windows and shards."""

import contextlib
import pathlib
import time
from collections.abc import Iterable, Iterator

import numpy as np

from flowhn_jax.data.chunking import split_into_chunks
from flowhn_jax.data.document import Document, OnBytesRead
from flowhn_jax.data.encoding import Chunk, encode
from flowhn_jax.data.packing import Packer
from flowhn_jax.data.prepare.holdout import assign_splits
from flowhn_jax.data.prepared import Split
from flowhn_jax.data.shards import ShardWriter
from flowhn_jax.data.sources import Source
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.utils.progress import Progress

_SECONDS_BETWEEN_RATES = 0.5


class SplitWriter:
    """A writer of one split: token ids to windows to shards."""

    def __init__(self, packer: Packer, shards: ShardWriter):
        self._packer = packer
        self._shards = shards
        self._windows = 0
        self._bytes = 0

    def add(self, chunk: Chunk, ids: np.ndarray) -> None:
        """Append a chunk of a document with its ids [T]."""
        if chunk.starts_document:
            self._packer.start_document()
        self._packer.add(ids)
        self._bytes += len(chunk.text)

    def flush(self) -> None:
        """Write the windows that are complete."""
        self._write(*self._packer.take())

    def close(self) -> Split:
        """Write the remaining windows and return what was written."""
        self._write(*self._packer.finish())
        return Split(
            self._windows,
            self._packer.targets,
            self._bytes,
            self._packer.documents,
            self._shards.close(),
        )

    def _write(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        self._windows += len(tokens)
        self._shards.write(tokens, segment_ids)


def split_writers(
    folder: pathlib.Path, tokenizer: Tokenizer, context: int, dtypes: tuple[str, str]
) -> dict[str, SplitWriter]:
    """Return the writers of the training and the validation split, by name.

    Args:
      folder: the folder for the shards.
      tokenizer: the tokenizer, whose special tokens separate documents.
      context: N; windows have N+1 tokens.
      dtypes: the data types of tokens and of segment ids in the records.
    """
    bos_id = tokenizer.first_ids[0] if tokenizer.first_token == "bos" else None
    return {
        name: SplitWriter(
            Packer(context, tokenizer.eot_id, bos_id), ShardWriter(folder, name, *dtypes)
        )
        for name in ("train", "validation")
    }


def write_splits(
    source: Source,
    tokenizer: Tokenizer,
    validation_fraction: float,
    workers: int,
    writers: dict[str, SplitWriter],
) -> dict[str, Split]:
    """Write the documents of a source and return the splits by name.

    Args:
      source: the documents.
      tokenizer: the tokenizer.
      validation_fraction: the share of the documents to hold out.
      workers: the number of processes that tokenize.
      writers: see `split_writers`.

    Raises:
      ValueError, OSError: see `preparation.prepare`.
    """
    with contextlib.ExitStack() as stack:
        on_bytes_read = stack.enter_context(_show_progress(source.size))
        documents = assign_splits(source.read(on_bytes_read), validation_fraction)
        chunks = _chunks(tokenizer, documents)
        groups = stack.enter_context(contextlib.closing(encode(tokenizer, chunks, workers)))
        for group in groups:
            for chunk, ids in group:
                writers[chunk.split].add(chunk, ids)
            for writer in writers.values():
                writer.flush()
    source.check_unchanged()
    return {name: writer.close() for name, writer in writers.items()}


def _chunks(tokenizer: Tokenizer, documents: Iterable[tuple[str, Document]]) -> Iterator[Chunk]:
    for split, document in documents:
        for number, (preceding, text) in enumerate(split_into_chunks(tokenizer, document)):
            yield Chunk(split, number == 0, text, preceding, document.name)


@contextlib.contextmanager
def _show_progress(size: int | None) -> Iterator[OnBytesRead]:
    """Yield the function that advances a progress bar by the bytes of the source that were read."""
    bytes_of_unknown_number = iter(())
    start = last = time.monotonic()
    with Progress(bytes_of_unknown_number if size is None else size, "preparing", "bytes") as bar:

        def on_bytes_read(count: int) -> None:
            nonlocal last
            bar.update(count)
            now = time.monotonic()
            if now - last > _SECONDS_BETWEEN_RATES:
                last = now
                bar.annotate(f"{bar.done / (now - start) / 1e6:,.1f} MB/s")

        yield on_bytes_read
