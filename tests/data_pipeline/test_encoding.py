import os

import numpy as np
import pytest

from flowhn_jax.data import encoding
from flowhn_jax.data.encoding import Piece, encode
from flowhn_jax.data.tokenizer import ByteTokenizer

PIECES = [Piece("train", i % 3 == 0, b"%d" % i * (1 + i % 7)) for i in range(200)]


class Deadly(ByteTokenizer):
    def encode(self, text):
        os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_order_and_bounded_reading(monkeypatch, workers):
    monkeypatch.setattr(encoding, "PIECE_BYTES", 12)
    taken = []

    def pieces():
        for piece in PIECES:
            taken.append(piece)
            yield piece

    groups = encode(ByteTokenizer(), pieces(), workers)
    found = next(groups)
    assert len(taken) < len(PIECES) / 3
    for group in groups:
        assert sum(len(piece.text) for piece, _ in group[:-1]) < 12
        found += group
    assert [piece for piece, _ in found] == PIECES
    for piece, ids in found:
        assert np.array_equal(ids, list(piece.text))


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(OSError, match="2 worker processes was killed"):
        list(encode(Deadly(), PIECES, 2))
