"""Encoding: chunks of text to token ids, in groups that one process encodes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flowhn_jax.data.chunking import encode_chunk, split_into_chunks
from flowhn_jax.data.document import Document
from flowhn_jax.data.tokenizer import Tokenizer

GROUP_BYTES = 1 << 22  # of text in a group: the unit of work, and of what a killed process loses


class Chunk(NamedTuple):
    """A chunk of a document.

    Attributes:
      starts_document: whether this is the document's first chunk.
      text: its text.
      preceding: the end of the text before it in the document, see `chunking`.
      document: the document's name, for messages.
    """

    starts_document: bool
    text: bytes
    preceding: bytes = b""
    document: str = ""


def groups(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[list[Chunk]]:
    """Yield the chunks of all documents in groups of about `GROUP_BYTES`.

    The groups depend on nothing but the documents and the tokenizer.
    """
    group, size = [], 0
    for document in documents:
        for number, (preceding, text) in enumerate(split_into_chunks(tokenizer, document)):
            group.append(Chunk(number == 0, text, preceding, document.name))
            size += len(text)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def encode(tokenizer: Tokenizer, group: Iterable[Chunk]) -> list[np.ndarray]:
    """Return the ids of each chunk, int32 [T].

    Raises:
      ValueError: the tokenizer fails on a chunk; the message names its document.
    """
    encoded = []
    for chunk in group:
        try:
            encoded.append(encode_chunk(tokenizer, chunk.preceding, chunk.text))
        except ValueError as error:
            where = f"{chunk.document}: " if chunk.document else ""
            raise ValueError(f"{where}{error}") from error
    return encoded
