"""What the tests of all operations with Triton kernels share."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels import triton_call
from kernels.scan_tiles import forward_and_backward

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def launches(function, *args):
    """Return the launches of a function of (run, *args), without running them."""
    seen = []

    def record(launch):
        seen.append(launch)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs.values())

    jax.eval_shape(partial(function, record), *args)
    return seen


def check_refusals(monkeypatch, reason):
    """Check where a backend refuses to run: without a new enough GPU, or without the packages.

    Pretends afterwards that it has both.

    Args:
      monkeypatch: the fixture.
      reason: returns the backend's `unsupported` for arrays that it takes.
    """
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "the compute capability of cpu is not known" in reason()
    monkeypatch.setattr(triton_call, "target_capability", lambda: 75)
    assert "it needs a compute capability of 80, this GPU's is 75" in reason()
    monkeypatch.setattr(triton_call, "target_capability", lambda: 90)
    with monkeypatch.context() as missing:
        missing.setattr(importlib.util, "find_spec", lambda name: name != "jax_triton" or None)
        assert "the package jax-triton is not installed" in reason()
    assert reason() is None


def check_what_is_timed(scan, inputs):
    """Check that the program by which a scan's tiles are timed computes all gradients.

    Through jax-triton, as far as a machine without a GPU goes: to the shapes.

    Args:
      scan: with a tile; runs the kernels through jax-triton.
      inputs: its arguments, some of which may be None.
    """
    pytest.importorskip("jax_triton", exc_type=ImportError)
    shapes = jax.eval_shape(lambda: list(inputs))
    present = [x for x in shapes if x is not None]
    results = jax.eval_shape(partial(forward_and_backward, scan, shapes), *present)
    floats = [x for x in present if jnp.issubdtype(x.dtype, jnp.floating)]
    assert [x.shape for x in results] == [x.shape for x in floats]
