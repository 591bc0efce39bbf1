"""Kernels on a mesh: each device runs them on its own part of the arrays.

XLA can cut its own operations over devices, but not a hand-written kernel. `over_mesh` cuts the
arguments along the dimensions in which the operation is independent, by `jax.shard_map`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Mesh axes that a dimension is cut over, by the letter that stands for it in the layouts: sequences
# B, and tokens N of all sequences.
_AXES = {"B": ("data",), "N": ("data",)}


def over_mesh(
    function: Callable[..., Any], layouts: Sequence[str], out_layouts: Any
) -> Callable[..., Any]:
    """`function` over the mesh that is set; itself where there is none, or one device.

    Args:
      function: takes arrays, or None, by position; no part of a dimension named in `_AXES` may
        depend on another.
      layouts: of each argument, a letter a dimension, as 'B L E'.
      out_layouts: a tree of layouts, as the function's results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    }
    if not axes:
        return function

    def mapped(*arguments: Array | None) -> Any:
        present = [i for i, x in enumerate(arguments) if x is not None]
        sizes = {
            letter: size
            for i in present
            for letter, size in zip(layouts[i].split(), arguments[i].shape, strict=True)
        }

        def cut(letter: str) -> tuple[str, ...] | None:
            names = tuple(name for name in _AXES.get(letter, ()) if name in axes)
            ways = math.prod(mesh.shape[name] for name in names)
            return names if names and sizes[letter] % ways == 0 else None

        def spec(layout: str) -> P:
            return P(*map(cut, layout.split()))

        def on_present(*arrays: Array) -> Any:
            whole = list(arguments)
            for i, x in zip(present, arrays, strict=True):
                whole[i] = x
            return function(*whole)

        # Kernels of libraries do not say over which axes their results vary: not checked.
        return jax.shard_map(
            on_present,
            in_specs=tuple(spec(layouts[i]) for i in present),
            out_specs=jax.tree.map(spec, out_layouts),
            axis_names=axes,
            check_vma=False,
        )(*(arguments[i] for i in present))

    return mapped
