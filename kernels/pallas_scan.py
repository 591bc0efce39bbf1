"""What the calls of the Pallas kernels of both state-space scans share."""

from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import tpu as pltpu

# For a grid (sequences, parts, chunks, steps of a chunk): only the last two must run in order.
WALK = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
)


def like(x: Array, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Any:
    """Return the type of a kernel's result, varying over devices as x does.

    Args:
      x: an argument of the kernel.
      shape: None: x's.
      dtype: None: x's.
    """
    return jax.ShapeDtypeStruct(
        x.shape if shape is None else shape,
        x.dtype if dtype is None else dtype,
        manual_axis_type=jax.typeof(x).manual_axis_type,
    )


def arrays_and_blocks(pairs: Any) -> tuple[Any, Any]:
    """Split pairs (array or its type, block spec) into a tuple of arrays and one of block specs.

    A pair may be None, which gives None in both. If `pairs` is a named tuple, both results have its
    type. `pallas_call` takes the two, and passes kernel references in place of the arrays.
    """
    arrays, blocks = zip(
        *((None, None) if pair is None else pair for pair in pairs),
        strict=True,
    )
    make = getattr(pairs, "_make", tuple)
    return make(arrays), make(blocks)


def moved_bytes(tree: Any) -> int:
    """Return the bytes of all arrays, or types of arrays, in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
