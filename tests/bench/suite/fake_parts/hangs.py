"""Hangs at 'b', after two rows in quick succession."""

from tests.bench.suite import fake_parts


def plan():
    return ["x", "a", "b", "c"]


def measure(missing, earlier):
    for key in missing:
        row = fake_parts.begin(__name__, key)
        if key == "b":
            fake_parts.hang()
        yield row
