"""Measures its keys."""

import os

from tests.bench.suite import fake_parts


def plan():
    return ["a", "b", "c"]


def measure(missing, earlier):
    for key in missing:
        keys = {name: [row["key"] for row in rows] for name, rows in earlier.items()}
        row = fake_parts.begin(__name__, key) | {"setting": os.environ.get("FAKE_SETTING")}
        print(f"steady is at {key}")
        yield row | {"earlier": keys}
