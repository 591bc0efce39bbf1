"""What the calls of the Pallas kernels of both state-space scans share."""

from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import tpu as pltpu

# Of a grid (sequences, parts, chunks, steps of a chunk), in which only the last two are a walk.
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
    """Return a tuple of pairs (array or its type, block spec), or None, as a tuple of each of both.

    They are of the same type if it is a named tuple. `pallas_call` takes the two, and passes the
    kernel references in place of the arrays.
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
