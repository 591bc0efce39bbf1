"""Takes the worker down at 'a' and leaves a child process that holds its connection open."""

import os
import time

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b"]


def measure(missing, earlier):
    for key in missing:
        row = fake_parts.begin(__name__, key)
        if key == "a":
            if os.fork() == 0:
                time.sleep(15)
                os._exit(0)
            fake_parts.die()
        yield row
