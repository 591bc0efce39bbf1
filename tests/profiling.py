"""Tests of JAX's profiler in the process of the tests."""

import sys

import pytest


@pytest.fixture
def usable_profiler():
    """Skip the test if libtpu is loaded, some versions of which break the profiler."""
    if "libtpu" in sys.modules:
        pytest.skip("libtpu, which this process has loaded, breaks JAX's profiler")
