"""Arrays on a mesh: what a dimension is cut over, and kernels on each device's own part.

XLA can cut its own operations over devices, but not a hand-written kernel. `over_mesh` cuts the
arguments along the dimensions in which the operation is independent, by `jax.shard_map`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# The mesh axes that a dimension is cut over, by the letter or word that stands for it in layouts.
# Of several the last ones are left out where they do not divide it.
AXES = {
    "B": ("data", "fsdp"),  # sequences
    "stream": ("branch", "sequence"),  # positions between the branches of one block and the next
    "L": ("sequence",),  # positions that a branch is given
    "N": ("data", "fsdp", "branch", "sequence"),  # tokens of all sequences
    "E": ("tensor",),  # channels of a state-space mixer
    "H": ("tensor",),  # heads of a state-space mixer
    "G": ("tensor",),  # groups of them
    "heads": ("tensor", "sequence"),  # query heads, each of which needs all positions
    "kv_heads": ("tensor", "sequence"),
    "F": ("tensor",),  # hidden units of an MLP
    "V": ("tensor",),  # vocabulary
    "shard": ("fsdp", "sequence"),  # a parameter's model width, to be gathered where it is used
    # On the way from an embedding in shards to the stream, which takes an axis at a time:
    "row": ("data",),  # sequences
    "column": ("branch",),  # positions
    "part": ("fsdp",),  # model width
}


def over_mesh(
    function: Callable[..., Any],
    layouts: Sequence[str],
    out_layouts: Any,
    *,
    meets: Sequence[str] = (),
) -> Callable[..., Any]:
    """`function` over the mesh that is set; itself where there is none, or one device.

    Args:
      function: takes arrays, or None, by position; no part of a dimension named in `AXES` may
        depend on another.
      layouts: of each argument, a letter a dimension, as 'B L E'.
      out_layouts: a tree of layouts, as the function's results.
      meets: letters in which the parts do depend on each other, as the function knows: it is given
        the mesh axes that each is cut over, a tuple, in this order behind its arguments.
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
        axes = [cut.get(letter) or () for letter in meets]
        if not active:
            return function(*arguments, *axes)

        def spec(layout: str) -> P:
            return P(*map(cut.get, layout.split()))

        def on_present(*arrays: Array) -> Any:
            whole = list(arguments)
            for i, x in zip(present, arrays, strict=True):
                whole[i] = x
            return function(*whole, *axes)

        # Kernels of libraries do not say over which axes their results vary: not checked.
        return jax.shard_map(
            on_present,
            in_specs=tuple(spec(layouts[i]) for i in present),
            out_specs=jax.tree.map(spec, out_layouts),
            axis_names=_automatic(mesh),  # with none left to XLA it does not cut the kernel itself
            check_vma=False,
        )(*(arguments[i] for i in present))

    return mapped if active or meets else function


def ways(letter: str) -> int:
    """Into how many parts the mesh that is set would cut the dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    active = _active(mesh)
    return math.prod(mesh.shape[name] for name in AXES[letter] if name in active)


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
    """The axes that each letter is cut over, for all letters alike.

    Where one letter does not divide by an axis, another is not cut over it either: query heads
    would part from their key-value heads. What is gathered anyhow keeps to itself.
    """

    def fitting(letter: str, usable: set[str]) -> tuple[str, ...]:
        names = tuple(name for name in AXES.get(letter, ()) if name in usable)
        return divided(names, sizes[letter], mesh.shape)

    usable = set(active)
    for letter in sizes:
        if letter != "shard":
            usable -= {name for name in AXES.get(letter, ()) if name not in fitting(letter, usable)}
    usable_by_shards = set(active)
    return {
        letter: fitting(letter, usable_by_shards if letter == "shard" else usable) or None
        for letter in sizes
    }


def divided(names: tuple[str, ...], size: int, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes that divide a dimension of so many, without the last ones that do not."""
    while size % math.prod(mesh_shape[name] for name in names):
        names = names[:-1]
    return names
