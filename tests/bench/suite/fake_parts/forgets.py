"""Gives no row for 'b', and never completes that of 'c'."""

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b", "c", "d"]


def measure(missing, earlier):
    for key in missing:
        row = fake_parts.begin(__name__, key)
        if key != "b":
            yield row | {"partial": True}
        if key not in ("b", "c"):
            yield row
