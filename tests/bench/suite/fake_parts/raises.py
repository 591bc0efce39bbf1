"""Raises after its first row."""

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b"]


def measure(missing, earlier):
    yield fake_parts.begin(__name__, missing[0])
    raise ValueError("the first line\nthe second line")
