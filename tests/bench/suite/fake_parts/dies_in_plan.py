"""Takes the worker down before it has reported its plan."""

from tests.bench.suite import fake_parts


def plan():
    fake_parts.die()


def measure(missing, earlier):
    return iter(())
