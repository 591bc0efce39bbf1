"""Arrays on a mesh: the axes that dimensions are sharded over, and kernels on each device's part.

XLA can partition its own operations, but not a hand-written kernel. `over_mesh` shards the
arguments along the dimensions in which the operation is independent, by `jax.shard_map`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# The mesh axes that a dimension is sharded over, by its letter or word in layouts. Where they do
# not divide the dimension, the last ones are left out.
AXES = {
    "B": ("data", "fsdp"),  # sequences
    "stream": ("branch", "sequence"),  # positions, outside the branches of a block
    "L": ("sequence",),  # positions, inside a branch
    "N": ("data", "fsdp", "branch", "sequence"),  # tokens of all sequences
    "E": ("tensor",),  # channels of a state-space mixer
    "H": ("tensor",),  # heads of a state-space mixer
    "G": ("tensor",),  # groups of such heads
    "heads": ("tensor", "sequence"),  # query heads, each of which needs all positions
    "kv_heads": ("tensor", "sequence"),
    "F": ("tensor",),  # hidden units of an MLP
    "V": ("tensor",),  # vocabulary
    "shard": ("fsdp", "sequence"),  # a parameter's model width, gathered before it is used
    # For the steps from a sharded embedding to the stream, one axis at a time:
    "row": ("data",),  # sequences
    "column": ("branch",),  # positions
    "part": ("fsdp",),  # model width
}


def over_mesh(
    function: Callable[..., Any],
    layouts: Sequence[str],
    out_layouts: Any,
    *,
    axes_of: Sequence[str] = (),
) -> Callable[..., Any]:
    """Return `function` run on each device's part of its arguments.

    Without a mesh, or on one device, that is the function itself.

    Args:
      function: takes arrays, or None, by position. The parts of a dimension named in `AXES` must
        not depend on each other, except for those of `axes_of`.
      layouts: the layouts of each argument, one letter or word per dimension, as 'B L E'.
      out_layouts: a tree of layouts, as the function's results.
      axes_of: letters whose parts depend on each other, which the function handles: after its
        arguments it gets, for each of these letters, the tuple of mesh axes it is sharded over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    active = _active(mesh)

    def mapped(*arguments: Array | None) -> Any:
        present = [i for i, x in enumerate(arguments) if x is not None]
        sizes = {
            letter: size
            for x, layout in zip(arguments, layouts, strict=True)
            if x is not None
            for letter, size in zip(layout.split(), x.shape, strict=True)
        }
        sharded = _axes_by_letter(mesh, active, sizes)
        axes = [sharded.get(letter) or () for letter in axes_of]
        if not active:
            return function(*arguments, *axes)

        def spec(layout: str) -> P:
            return P(*map(sharded.get, layout.split()))

        def on_present(*arrays: Array) -> Any:
            whole = list(arguments)
            for i, x in zip(present, arrays, strict=True):
                whole[i] = x
            return function(*whole, *axes)

        # check_vma is off: libraries' kernels do not declare over which axes their results vary.
        return jax.shard_map(
            on_present,
            in_specs=tuple(spec(layouts[i]) for i in present),
            out_specs=jax.tree.map(spec, out_layouts),
            axis_names=_automatic(mesh),  # all, so that XLA does not partition the kernel itself
            check_vma=False,
        )(*(x for x in arguments if x is not None))

    return mapped if active or axes_of else function


def num_parts(letter: str) -> int:
    """Return the number of parts into which the mesh that is set would shard the dimension."""
    mesh = jax.sharding.get_abstract_mesh()
    active = _active(mesh)
    return math.prod(mesh.shape[name] for name in AXES[letter] if name in active)


def constrain(x: Array, layout: str) -> Array:
    """Return x sharded over the mesh that is set, by its layout; x itself if there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if not (active := _active(mesh)):
        return x
    letters = layout.split()
    sharded = _axes_by_letter(mesh, active, dict(zip(letters, x.shape, strict=True)))
    return jax.lax.with_sharding_constraint(x, P(*map(sharded.get, letters)))


def _active(mesh: jax.sharding.AbstractMesh) -> set[str]:
    """Return the axes of more than one device that XLA partitions."""
    return {name for name in _automatic(mesh) if mesh.shape[name] > 1}


def _automatic(mesh: jax.sharding.AbstractMesh) -> set[str]:
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in axes if kind == AxisType.Auto}


def _axes_by_letter(
    mesh: jax.sharding.AbstractMesh, active: Iterable[str], sizes: dict[str, int]
) -> dict[str, tuple[str, ...] | None]:
    """Return the axes that each letter is sharded over.

    If an axis does not divide one letter, no other letter is sharded over it either: otherwise
    query heads would be separated from their key-value heads. 'shard', which is gathered anyway, is
    independent.
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
    """Return the axes without the last ones, as far as needed for them to divide a dimension."""
    while size % math.prod(mesh_shape[name] for name in names):
        names = names[:-1]
    return names
