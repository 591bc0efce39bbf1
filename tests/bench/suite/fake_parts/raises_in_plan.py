"""Raises instead of reporting its plan."""


def plan():
    raise OSError("no plan")


def measure(missing, earlier):
    return iter(())
