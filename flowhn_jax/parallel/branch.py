"""Branch parallelism: the two branches of a block run at the same time on two device groups."""

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
    """The computation of one group of devices.

    Attributes:
      function: maps parameters and inputs to [B, T, D]. Sequences must not depend on each other.
      params: a tree of arrays.
      inputs: a tree of arrays [B, ...] and None.
      length: T of the result.
    """

    function: Callable[[Any, Any], Array]
    params: Any
    inputs: Any
    length: int


def is_parallel() -> bool:
    """Return whether the current mesh has two groups of devices for the branches."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1) == 2


def run_alone(part: Part) -> Array:
    """Return the result of a single part, on a mesh with two groups of devices.

    Both groups compute it, each for its half of the sequences where their number is even.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in (*_BATCH_AXES, AXIS) if name in mesh.axis_names)
    axes = divided(names, jax.tree.leaves(part.inputs)[0].shape[0], mesh.shape)
    return jax.shard_map(
        part.function,
        in_specs=(P(), P(axes)),
        out_specs=P(axes),
        check_vma=False,  # as in `side_by_side`
    )(part.params, part.inputs)


def side_by_side(first: Part, second: Part) -> tuple[Array, Array]:
    """Return the results of both parts, each computed on its half of the mesh axis `branch`.

    Each group of devices computes one part and sends the result to the other group. Both results
    are padded to the longer one, so that all devices run the same program. Sequences are sharded
    over all other axes that divide them, and parameters are replicated while they are used. A group
    then computes without communication, because a collective would need both groups to reach the
    same point of the program. Gradients are summed over the groups, of which one adds zeros.

    Args:
      first: the part of the first group.
      second: the part of the second group. Its result may have another length T, but has the same
        dtype and number of sequences.

    Returns:
      Both results, on all devices.
    """
    parts = first, second
    lengths = [part.length for part in parts]
    batch, longer = jax.tree.leaves(first.inputs)[0].shape[0], max(lengths)
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in _BATCH_AXES if name in mesh.axis_names)
    axes = divided(names, batch, mesh.shape)  # along other axes the work is replicated

    def compute(*arguments: tuple[Any, Any]) -> Array:
        def run(part: Part, argument: tuple[Any, Any]) -> Array:
            out = part.function(*argument)
            return jnp.pad(out, ((0, 0), (0, longer - out.shape[1]), (0, 0)))

        runs = [partial(run, *each) for each in zip(parts, arguments, strict=True)]
        return lax.all_gather(lax.cond(lax.axis_index(AXIS) == 0, *runs), AXIS)

    both = jax.shard_map(
        compute,
        in_specs=((P(), P(axes)),) * 2,
        out_specs=P(None, axes),
        check_vma=False,  # library kernels do not declare over which axes their results vary
    )(*((part.params, part.inputs) for part in parts))
    return both[0][:, : lengths[0]], both[1][:, : lengths[1]]
