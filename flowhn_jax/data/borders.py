"""Cutting long documents so that pieces, tokenized one by one, have the tokens of the whole."""

import re
from collections.abc import Iterator

import numpy as np

from flowhn_jax.data.document import Document
from flowhn_jax.data.tokenizer import Tokenizer

CONTEXT_BYTES = 1 << 12  # of text on either side of a border that its tokens may depend on

_MAX_WORDS, _MAX_CHARACTERS = 64, 256  # borders to try
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def split(tokenizer: Tokenizer, document: Document) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pieces of a document, each after the text before it (at most `CONTEXT_BYTES`).

    A border is moved back to where the tokens before it do not depend on the text after it:
    a word's end where there is one. `encode_after` then gives the tokens of a piece.
    """
    before, piece = b"", b""
    pieces = document.pieces()
    for following in pieces:
        while len(following) < CONTEXT_BYTES and (more := next(pieces, b"")):
            following += more
        if piece:
            end = _border(tokenizer, before, piece, following)
            yield before, piece[:end]
            before = _tail(before + piece[max(0, end - CONTEXT_BYTES) : end])
            piece = piece[end:]
        piece += following
    if piece:
        yield before, piece


def encode_after(tokenizer: Tokenizer, before: bytes, text: bytes) -> np.ndarray:
    """Return the ids of `text`, int32 [T], as part of a document that has `before` before it."""
    if before:
        context, ids = tokenizer.encode(before), tokenizer.encode(before + text)
        if _starts_with(ids, context):
            return ids[len(context) :]
    return tokenizer.encode(text)


def _border(tokenizer: Tokenizer, before: bytes, piece: bytes, following: bytes) -> int:
    """Return how many bytes of `piece` to keep; the rest belongs to what follows."""
    movable = _text(piece[-CONTEXT_BYTES:])
    context = _text(_tail(before + piece[: -len(movable.encode())][-CONTEXT_BYTES:]))
    together = tokenizer.encode(context + movable + _text(following[:CONTEXT_BYTES]))
    word_ends = [match.start() for match in _WORD_END.finditer(movable + _text(following[:8]))]
    characters = range(len(movable), 0, -1)
    for end in [
        *[end for end in reversed(word_ends) if end <= len(movable)][:_MAX_WORDS],
        *characters[:_MAX_CHARACTERS],
    ]:
        if _starts_with(together, tokenizer.encode(context + movable[:end])):
            return len(piece) - len(movable[end:].encode())
    return len(piece)


def _starts_with(ids: np.ndarray, first: np.ndarray) -> bool:
    return np.array_equal(ids[: len(first)], first)


def _tail(text: bytes) -> bytes:
    """Return the end of a text, from a character on."""
    return _text(text[-CONTEXT_BYTES:]).encode()


def _text(text: bytes) -> str:
    return text.decode(errors="ignore")  # only a character that was cut off is left out
