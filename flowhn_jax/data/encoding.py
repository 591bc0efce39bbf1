"""Encoding: pieces of text to token ids, in one process or in several, always in order."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flowhn_jax.data.borders import encode_after
from flowhn_jax.data.document import PIECE_BYTES
from flowhn_jax.data.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A piece of a document."""

    split: str  # that the document belongs to
    starts: bool  # whether it is the document's first
    text: bytes
    before: bytes = b""  # the end of the text before it in the document, see `borders.split`
    document: str = ""  # its name, for messages


def encode(
    tokenizer: Tokenizer, pieces: Iterable[Piece], workers: int
) -> Iterator[list[tuple[Piece, np.ndarray]]]:
    """Yield each piece with its ids, int32 [T], in groups, in order, by `workers` processes.

    Raises:
      OSError: a worker was killed.
      ValueError: the tokenizer fails on a piece.
    """
    groups = _grouped(pieces)
    if workers == 1:
        for group in groups:
            yield list(zip(group, _encode_pieces(tokenizer, group), strict=True))
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
            f"One of {workers} worker processes was killed, perhaps for want of memory."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups of about `PIECE_BYTES`, so that one trip to a worker is worth it."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.text)
        if size >= PIECE_BYTES:
            yield group
            group, size = [], 0
    yield group


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends a worker whose parent was killed, and which would wait for work for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(pieces: list[Piece]) -> list[np.ndarray]:
    return _encode_pieces(_tokenizer, pieces)


def _encode_pieces(tokenizer: Tokenizer, pieces: list[Piece]) -> list[np.ndarray]:
    found = []
    for piece in pieces:
        try:
            found.append(encode_after(tokenizer, piece.before, piece.text))
        except ValueError as error:
            where = f"{piece.document}: " if piece.document else ""
            raise ValueError(f"{where}{error}") from error
    return found
