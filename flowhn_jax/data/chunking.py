"""Chunking: splitting long documents so that the chunks' tokens are those of the whole text."""

import re
from collections.abc import Iterator

import numpy as np

from flowhn_jax.data.document import Document
from flowhn_jax.data.tokenizer import Tokenizer

CONTEXT_BYTES = 1 << 12  # of text on either side of a boundary that its tokens may depend on

_MAX_WORDS, _MAX_CHARACTERS = 64, 256  # boundaries to try
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def split_into_chunks(tokenizer: Tokenizer, document: Document) -> Iterator[tuple[bytes, bytes]]:
    """Yield each chunk of a document, with the text before it (at most `CONTEXT_BYTES`) first.

    Each boundary is moved back to a place where the tokens before it do not depend on the text
    after it, at the end of a word if possible. `encode_chunk` then returns the tokens of a chunk.
    """
    preceding, chunk = b"", b""
    chunks = document.chunks()
    for following in chunks:
        while len(following) < CONTEXT_BYTES and (more := next(chunks, b"")):
            following += more
        if chunk:
            end = _boundary(tokenizer, preceding, chunk, following)
            yield preceding, chunk[:end]
            preceding = _tail(preceding + chunk[max(0, end - CONTEXT_BYTES) : end])
            chunk = chunk[end:]
        chunk += following
    if chunk:
        yield preceding, chunk


def encode_chunk(tokenizer: Tokenizer, preceding: bytes, text: bytes) -> np.ndarray:
    """Return the ids of `text`, int32 [T], as they are in a document after `preceding`."""
    if preceding:
        context, ids = tokenizer.encode(preceding), tokenizer.encode(preceding + text)
        if _starts_with(ids, context):
            return ids[len(context) :]
    return tokenizer.encode(text)


def _boundary(tokenizer: Tokenizer, preceding: bytes, chunk: bytes, following: bytes) -> int:
    """Return how many bytes of `chunk` to keep; the rest belongs to the next chunk."""
    movable = _decode(chunk[-CONTEXT_BYTES:])
    context = _decode(_tail(preceding + chunk[: -len(movable.encode())][-CONTEXT_BYTES:]))
    together = tokenizer.encode(context + movable + _decode(following[:CONTEXT_BYTES]))
    word_ends = [match.start() for match in _WORD_END.finditer(movable + _decode(following[:8]))]
    characters = range(len(movable), 0, -1)
    for end in [
        *[end for end in reversed(word_ends) if end <= len(movable)][:_MAX_WORDS],
        *characters[:_MAX_CHARACTERS],
    ]:
        if _starts_with(together, tokenizer.encode(context + movable[:end])):
            return len(chunk) - len(movable[end:].encode())
    return len(chunk)


def _starts_with(ids: np.ndarray, first: np.ndarray) -> bool:
    return np.array_equal(ids[: len(first)], first)


def _tail(text: bytes) -> bytes:
    """Return the end of a text, starting with a whole character."""
    return _decode(text[-CONTEXT_BYTES:]).encode()


def _decode(text: bytes) -> str:
    return text.decode(errors="ignore")  # drops at most a truncated character at either end
