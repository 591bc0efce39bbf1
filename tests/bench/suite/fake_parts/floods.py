"""Yields rows without a pause for eight seconds."""

import time

from tests.bench.suite import fake_parts


def plan():
    return [f"k{i}" for i in range(400)]


def measure(missing, earlier):
    for key in missing:
        time.sleep(0.02)
        yield fake_parts.begin(__name__, key)
