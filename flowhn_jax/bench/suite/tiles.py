"""Part `tiles`: the tiles of the Triton scan, each timed forward and backward."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite.workload import Earlier, recipe
from flowhn_jax.config import require_flowhn
from kernels.scan_tiles import forward_and_backward
from kernels.selective_scan import triton
from kernels.tuning import time_tiles

_SHAPES = {"135m": (16, 1024), "1b": (8, 1024), "135m, long": (2, 8192)}  # sequences, tokens


def plan() -> list[str]:
    """Return the names of the shapes; none without an NVIDIA GPU and Triton."""
    found = all(importlib.util.find_spec(name) for name in ("triton", "jax_triton"))
    return list(_SHAPES) if jax.default_backend() == "gpu" and found else []


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: seconds of each tile that runs."""
    for key in missing:
        yield attempt({"key": key}, functools.partial(_measure, key))


def arguments(key: str) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """Return the scan's arguments at a named shape, as a Mamba-1 mixer passes them in training."""
    batch, length = _SHAPES[key]
    model = recipe(key.partition(",")[0], "fac_split").model
    dims = require_flowhn(model, "the tiles of its scan").dims
    tokens = jax.ShapeDtypeStruct((batch, length, dims.inner), jnp.bfloat16)
    states = jax.ShapeDtypeStruct((batch, length, dims.state), jnp.bfloat16)
    channels = jax.ShapeDtypeStruct((dims.inner,), jnp.float32)
    A = jax.ShapeDtypeStruct((dims.inner, dims.state), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return tokens, tokens, A, states, states, channels, tokens, channels, segment_ids, None


def _measure(key: str) -> Row:
    shapes = arguments(key)
    given = [x for x in shapes if x is not None]
    batch, length, width = given[0].shape
    seconds = time_tiles(
        key,
        triton.candidates(batch * width),
        lambda tile: functools.partial(forward_and_backward, triton.timed(tile), shapes),
        given,
    )
    if not seconds:
        raise RuntimeError("no tile runs; suite.log has the messages")
    return {
        "shape": str([batch, length, width]),
        "seconds": {_name(tile): each for tile, each in seconds.items()},
        "default": _name(triton.DEFAULT),
    }


def _name(tile: Sequence[int]) -> str:
    """Return a tile as 'tokens x channels x warps'."""
    return " x ".join(map(str, tile))
