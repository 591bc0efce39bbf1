"""Takes the worker down at 'b' and at 'e'."""

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b", "c", "d", "e"]


def measure(missing, earlier):
    for key in missing:
        row = fake_parts.begin(__name__, key)
        if key in ("b", "e"):
            fake_parts.die()
        yield row
