"""Arrays on a mesh: what a dimension is cut over, and kernels on each device's own part.

XLA can cut its own operations over devices, but not a hand-written kernel. `over_mesh` cuts the
arguments along the dimensions in which the operation is independent, by `jax.shard_map`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# The mesh axes that a dimension is cut over, by the letter or word that stands for it in layouts.
AXES = {
    "B": ("data", "fsdp"),  # sequences
    "stream": ("branch",),  # positions of a sequence between the branches of one block and the next
    "N": ("data", "fsdp", "branch"),  # tokens of all sequences
    "E": ("tensor",),  # channels of a state-space mixer
    "H": ("tensor",),  # heads
    "G": ("tensor",),  # key-value heads, or groups of heads
    "F": ("tensor",),  # hidden units of an MLP
    "V": ("tensor",),  # vocabulary
}


def over_mesh(
    function: Callable[..., Any],
    layouts: Sequence[str],
    out_layouts: Any,
    *,
    reduced: str | None = None,
) -> Callable[..., Any]:
    """`function` over the mesh that is set; itself where there is none, or one device.

    Args:
      function: takes arrays, or None, by position; no part of a dimension named in `AXES` may
        depend on another.
      layouts: of each argument, a letter a dimension, as 'B L E'.
      out_layouts: a tree of layouts, as the function's results.
      reduced: a letter in which the operation is not independent: the function is given the mesh
        axes that it is cut over as the keyword `axes`, a tuple, to sum over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    active = _active(mesh)

    def mapped(*arguments: Array | None) -> Any:
        present = [i for i, x in enumerate(arguments) if x is not None]
        sizes = {
            letter: size
            for i in present
            for letter, size in zip(layouts[i].split(), arguments[i].shape, strict=True)
        }
        cut = _cut(mesh, active, sizes)
        keywords = {} if reduced is None else {"axes": cut.get(reduced) or ()}
        if not active:
            return function(*arguments, **keywords)

        def spec(layout: str) -> P:
            return P(*map(cut.get, layout.split()))

        def on_present(*arrays: Array) -> Any:
            whole = list(arguments)
            for i, x in zip(present, arrays, strict=True):
                whole[i] = x
            return function(*whole, **keywords)

        # Kernels of libraries do not say over which axes their results vary: not checked.
        return jax.shard_map(
            on_present,
            in_specs=tuple(spec(layouts[i]) for i in present),
            out_specs=jax.tree.map(spec, out_layouts),
            axis_names=_automatic(mesh),  # with none left to XLA it does not cut the kernel itself
            check_vma=False,
        )(*(arguments[i] for i in present))

    return function if reduced is None and not active else mapped


def constrain(x: Array, layout: str) -> Array:
    """x, cut over the mesh that is set as its layout says; x itself where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if not (active := _active(mesh)):
        return x
    letters = layout.split()
    cut = _cut(mesh, active, dict(zip(letters, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, P(*map(cut.get, letters)))


def _active(mesh: jax.sharding.AbstractMesh) -> set[str]:
    """The axes of more than one device that are left to XLA."""
    return {name for name in _automatic(mesh) if mesh.shape[name] > 1}


def _automatic(mesh: jax.sharding.AbstractMesh) -> set[str]:
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in axes if kind == AxisType.Auto}


def _cut(
    mesh: jax.sharding.AbstractMesh, active: Iterable[str], sizes: dict[str, int]
) -> dict[str, tuple[str, ...] | None]:
    """The axes that each letter is cut over: all or none of `AXES`, and for all letters alike.

    Where one letter does not divide, another of the same axes is not cut either: query heads would
    part from their key-value heads.
    """
    usable = set(active)
    while True:
        cut = {letter: tuple(a for a in AXES.get(letter, ()) if a in usable) for letter in sizes}
        uneven = [
            letter
            for letter, names in cut.items()
            if sizes[letter] % math.prod(mesh.shape[name] for name in names)
        ]
        if not uneven:
            return {letter: names or None for letter, names in cut.items()}
        usable -= {name for letter in uneven for name in cut[letter]}
