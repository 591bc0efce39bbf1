"""Inside `jax.shard_map`: types of arrays that differ between devices."""

from typing import TypeVar

import jax
from jax import lax

Tree = TypeVar("Tree")


def vary_alike(tree: Tree) -> Tree:
    """Mark all arrays of a tree as varying over each manual mesh axis that any of them varies over.

    `jax.lax.scan` and `jax.custom_vjp` need it inside `jax.shard_map`; elsewhere it does nothing.
    The gradient of an array that was the same on all devices is summed over them.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = axes - _varying(x)
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _varying(x) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
