"""Branch parallelism: the two branches of a block at the same time, on two groups of devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from kernels.partition import AXES, divided

AXIS = "branch"
_BATCH_AXES = (*AXES["B"], "tensor")


class Part(NamedTuple):
    """What one group of devices is to compute.

    Attributes:
      function: from parameters and inputs to [B, T, D], T that of the inputs; sequences do not
        depend on each other.
      params: a tree of arrays.
      inputs: a tree of arrays [B, T, ...], and None.
    """

    function: Callable[[Any, Any], Array]
    params: Any
    inputs: Any

    def run(self) -> Array:
        """The result, [B, T, D]."""
        return self.function(self.params, self.inputs)


def is_parallel() -> bool:
    """Whether the mesh that is set has two groups of devices for the branches."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1) == 2


def side_by_side(first: Part, second: Part) -> tuple[Array, Array]:
    """The results of both parts, each computed on its half of the axis `branch`.

    Each group of devices computes one part and sends the other group the result. Both are padded
    to the longer one, so that the program is one for all devices. Sequences are cut over all other
    axes as far as they go, and the parameters are whole on every device while they are used: a
    group then computes without a word to others, which it could only have where both groups come
    by the same point of the program. Gradients are summed over the groups, of which one adds zeros.

    Args:
      first, second: their results have unlike lengths T, but one dtype and one number of sequences.

    Returns:
      Both results, on all devices.
    """
    parts = first, second
    lengths = [jax.tree.leaves(part.inputs)[0].shape[1] for part in parts]
    batch, longer = jax.tree.leaves(first.inputs)[0].shape[0], max(lengths)
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in _BATCH_AXES if name in mesh.axis_names)
    axes = divided(names, batch, mesh.shape)  # along others devices repeat their neighbours' work

    def on_a_group(*arguments: tuple[Any, Any]) -> Array:
        def run(part: Part, argument: tuple[Any, Any]) -> Array:
            out = part.function(*argument)
            return jnp.pad(out, ((0, 0), (0, longer - out.shape[1]), (0, 0)))

        runs = [partial(run, *each) for each in zip(parts, arguments, strict=True)]
        return lax.all_gather(lax.cond(lax.axis_index(AXIS) == 0, *runs), AXIS)

    both = jax.shard_map(
        on_a_group,
        in_specs=((P(), P(axes)),) * 2,
        out_specs=P(None, axes),
        check_vma=False,  # kernels of libraries do not say over which axes their results vary
    )(*((part.params, part.inputs) for part in parts))
    return tuple(out[:, :length] for out, length in zip(both, lengths, strict=True))
