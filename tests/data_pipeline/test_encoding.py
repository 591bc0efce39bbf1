import os

import numpy as np
import pytest

from flowhn_jax.data import encoding
from flowhn_jax.data.encoding import Chunk, encode
from flowhn_jax.data.tokenizer import ByteTokenizer

CHUNKS = [Chunk("train", i % 3 == 0, b"%d" % i * (1 + i % 7)) for i in range(200)]


class ExitingTokenizer(ByteTokenizer):
    def encode(self, text):
        os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_chunks_stay_in_order_and_few_are_read_ahead(monkeypatch, workers):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 12)
    taken = []

    def chunks():
        for chunk in CHUNKS:
            taken.append(chunk)
            yield chunk

    groups = encode(ByteTokenizer(), chunks(), workers)
    found = next(groups)
    assert len(taken) < len(CHUNKS) / 3
    for group in groups:
        assert sum(len(chunk.text) for chunk, _ in group[:-1]) < 12
        found += group
    assert [chunk for chunk, _ in found] == CHUNKS
    for chunk, ids in found:
        assert np.array_equal(ids, list(chunk.text))


def test_a_killed_worker_is_an_error():
    with pytest.raises(OSError, match="2 worker processes was killed"):
        list(encode(ExitingTokenizer(), CHUNKS, 2))
