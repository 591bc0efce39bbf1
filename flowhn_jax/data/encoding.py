"""Encoding: chunks of text to token ids, in order, in one process or several."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flowhn_jax.data.chunking import encode_chunk
from flowhn_jax.data.document import CHUNK_BYTES
from flowhn_jax.data.tokenizer import Tokenizer


class Chunk(NamedTuple):
    """A chunk of a document.

    Attributes:
      split: the split that the document belongs to.
      starts_document: whether this is the document's first chunk.
      text: its text.
      preceding: the end of the text before it in the document, see `chunking`.
      document: the document's name, for messages.
    """

    split: str
    starts_document: bool
    text: bytes
    preceding: bytes = b""
    document: str = ""


def encode(
    tokenizer: Tokenizer, chunks: Iterable[Chunk], workers: int
) -> Generator[list[tuple[Chunk, np.ndarray]], None, None]:
    """Yield the chunks with their ids, int32 [T], in groups and in order.

    Args:
      tokenizer: the tokenizer.
      chunks: the chunks, which are read a few groups ahead.
      workers: processes that encode; with 1, the calling process encodes.

    Raises:
      OSError: a worker was killed.
      ValueError: the tokenizer fails on a chunk.
    """
    groups = _grouped(chunks)
    if workers == 1:
        for group in groups:
            yield list(zip(group, _encode_group(tokenizer, group), strict=True))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,)
    )
    try:
        waiting = collections.deque()
        for group in groups:
            waiting.append((group, pool.submit(_encode_in_worker, group)))
            if len(waiting) > 2 * workers:  # bounds the memory, and keeps every worker busy
                group, future = waiting.popleft()
                yield list(zip(group, future.result(), strict=True))
        for group, future in waiting:
            yield list(zip(group, future.result(), strict=True))
    except concurrent.futures.process.BrokenProcessPool as error:
        raise OSError(
            f"One of the {workers} worker processes was killed, possibly because memory ran out; "
            "use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _grouped(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Yield groups of chunks of about `CHUNK_BYTES`, which are worth sending to a worker."""
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += len(chunk.text)
        if size >= CHUNK_BYTES:
            yield group
            group, size = [], 0
    yield group


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(chunks: list[Chunk]) -> list[np.ndarray]:
    return _encode_group(_tokenizer, chunks)


def _encode_group(tokenizer: Tokenizer, chunks: list[Chunk]) -> list[np.ndarray]:
    encoded = []
    for chunk in chunks:
        try:
            encoded.append(encode_chunk(tokenizer, chunk.preceding, chunk.text))
        except ValueError as error:
            where = f"{chunk.document}: " if chunk.document else ""
            raise ValueError(f"{where}{error}") from error
    return encoded
