"""Hangs at 'b' the first time."""

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b", "c"]


def measure(missing, earlier):
    for key in missing:
        is_first = fake_parts.begun(__name__, key) == 0
        row = fake_parts.begin(__name__, key)
        if key == "b" and is_first:
            fake_parts.hang()
        yield row
