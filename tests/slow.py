"""Parametrized tests of which some cases alone are fast enough for every run."""

import pytest


def all_but(fast, values):
    """Return the values of a parameter; those that are not in `fast` are marked slow."""
    assert set(map(repr, fast)) <= set(map(repr, values))
    return [
        value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
