"""Its first key fails the first time."""

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b", "c"]


def measure(missing, earlier):
    for key in missing:
        fails = key == "a" and fake_parts.begun(__name__, key) == 0
        row = fake_parts.begin(__name__, key)
        yield {"key": key, "failed": "ValueError: not yet"} if fails else row
