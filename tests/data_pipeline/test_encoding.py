import itertools
import os

import numpy as np
import pytest

from flowhn_jax.data import encoding
from flowhn_jax.data.document import Document
from flowhn_jax.data.encoding import encode, groups
from flowhn_jax.data.prepare.workers import WorkerKilledError, Workers
from flowhn_jax.data.tokenizer import ByteTokenizer

TEXTS = [b"%d" % i * (1 + i % 7) for i in range(200)]


def square_plus(shared, number):
    return number * number + shared


def die(shared, number):
    os._exit(1)


def fail(shared, number):
    raise ValueError(f"{number} is wrong")


def test_groups_keep_the_order_and_few_documents_are_read_ahead(monkeypatch):
    monkeypatch.setattr(encoding, "GROUP_BYTES", 12)
    taken = []

    def documents():
        for number, text in enumerate(TEXTS):
            taken.append(text)
            yield Document(f"document {number}", text)

    found, first = [], True
    for group in groups(ByteTokenizer(), documents()):
        if first:
            assert len(taken) < len(TEXTS) / 3
        first = False
        assert sum(len(chunk.text) for chunk in group[:-1]) < 12
        found += zip(group, encode(ByteTokenizer(), group), strict=True)
    assert [chunk.text for chunk, _ in found] == TEXTS
    assert all(chunk.starts_document for chunk, _ in found)
    for chunk, ids in found:
        assert np.array_equal(ids, list(chunk.text))


@pytest.mark.parametrize("count", [1, 2])
def test_results_are_in_order_and_few_tasks_are_read_ahead(count):
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield (number,)

    with Workers(count, 5) as workers:
        results = workers.map(square_plus, tasks())
        assert list(itertools.islice(results, 3)) == [5, 6, 9]
        assert len(taken) < 10
        assert list(results) == [number * number + 5 for number in range(3, 100)]
        with pytest.raises(ValueError, match="7 is wrong"):
            list(workers.map(fail, [(7,)]))


def test_a_killed_worker_is_an_error():
    with (
        pytest.raises(WorkerKilledError, match="2 worker processes was killed"),
        Workers(2, None) as workers,
    ):
        list(workers.map(die, [(number,) for number in range(9)]))
