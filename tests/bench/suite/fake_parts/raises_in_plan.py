"""Cannot even say what it measures."""


def plan():
    raise OSError("no plan")


def measure(missing, earlier):
    return iter(())
