"""Measures many keys, a quarter of a second each, with a partial row first."""

import time

from tests.bench.suite import fake_parts


def plan():
    return [f"k{i}" for i in range(12)]


def measure(missing, earlier):
    for key in missing:
        row = fake_parts.begin(__name__, key)
        yield row | {"partial": True}
        time.sleep(0.25)
        yield row
