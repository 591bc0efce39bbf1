"""Part `tiles`: the tiles of the Triton scans, each timed forward and backward."""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.suite.workload import Earlier, recipe
from flowhn_jax.config import require_flowhn
from flowhn_jax.models.mamba import Mamba2Config
from kernels.scan_inputs import ScanInputs
from kernels.scan_tiles import forward_and_backward
from kernels.selective_scan import triton as selective_scan
from kernels.ssd import triton as ssd
from kernels.tuning import time_tiles

_KERNELS = {"selective_scan": selective_scan, "ssd": ssd}
_SHAPES = (("135m", 1024, 16), ("1b", 1024, 8), ("135m", 8192, 2))  # tokens, sequences


def plan() -> list[str]:
    """Return OPERATION/SIZE/LENGTH for the shapes; none without an NVIDIA GPU and Triton."""
    found = all(importlib.util.find_spec(name) for name in ("triton", "jax_triton"))
    return keys() if jax.default_backend() == "gpu" and found else []


def keys() -> list[str]:
    """Return OPERATION/SIZE/LENGTH for the shapes."""
    return [f"{operation}/{size}/{length}" for size, length, _ in _SHAPES for operation in _KERNELS]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows: seconds of each tile that runs."""
    for key in missing:
        yield attempt({"key": key}, functools.partial(_measure, key))


def inputs(key: str) -> ScanInputs:
    """Return the shapes of the scan's inputs, as a mixer passes them in training on a GPU."""
    operation, size, length = key.split("/")
    (batch,) = (n for shape in _SHAPES if shape[:2] == (size, int(length)) for n in shape[2:])
    make = {"selective_scan": _of_mamba1, "ssd": _of_mamba2}[operation]
    return make(size, batch, int(length))


def _of_mamba1(size: str, batch: int, length: int) -> ScanInputs:
    """Return the inputs of a Mamba-1 mixer that sees all tokens; dt, B and C come from norms."""
    model = recipe(size, "no_split").model
    dims = require_flowhn(model, "the tiles of its scan").dims
    tokens = _array(batch, length, dims.inner, dtype=jnp.bfloat16)
    states = _array(batch, length, dims.state)
    return ScanInputs(
        x=tokens,
        dt=_array(batch, length, dims.inner),
        A=_array(dims.inner, dims.state),
        B=states,
        C=states,
        D=_array(dims.inner),
        z=tokens,
        dt_bias=_array(dims.inner),
        segment_ids=_array(batch, length, dtype=jnp.int32),
    )


def _of_mamba2(size: str, batch: int, length: int) -> ScanInputs:
    """Return the inputs of a Mamba-2 mixer."""
    sizes = cast("Mamba2Config", recipe(size, "mamba2").model).mamba2_sizes
    heads = sizes.inner // sizes.head_dim
    states = _array(batch, length, sizes.groups, sizes.state, dtype=jnp.bfloat16)
    return ScanInputs(
        x=_array(batch, length, heads, sizes.head_dim, dtype=jnp.bfloat16),
        dt=_array(batch, length, heads, dtype=jnp.bfloat16),
        A=_array(heads),
        B=states,
        C=states,
        D=_array(heads),
        dt_bias=_array(heads),
        segment_ids=_array(batch, length, dtype=jnp.int32),
    )


def _array(*shape: int, dtype: DTypeLike = jnp.float32) -> Any:
    """Return the shape and dtype of an array, for programs that are only traced."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _measure(key: str) -> Row:
    shapes, kernels = inputs(key), _KERNELS[key.partition("/")[0]]
    given: list[Any] = [x for x in shapes if x is not None]
    seconds = time_tiles(
        key,
        kernels.candidates(shapes),
        lambda tile: functools.partial(forward_and_backward, kernels.timed(tile), shapes),
        given,
    )
    if not seconds:
        raise RuntimeError("no tile runs; suite.log has the messages")
    return {
        "shape": str(list(shapes.x.shape)),
        "seconds": {_name(tile): each for tile, each in seconds.items()},
        "default": _name(kernels.DEFAULT),
    }


def _name(tile: Sequence[int]) -> str:
    """Return a tile as '16 x 32 x 4'."""
    return " x ".join(map(str, tile))
