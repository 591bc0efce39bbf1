"""Sum arrays over a mesh axis such that each device gets its part of the sum."""

import jax.numpy as jnp
from jax import Array, lax

from kernels.backends import target_platform

# Steps of a ring are separate operations in the program, so their number must have a limit.
_MAX_RING = 64


def reduce_scatter(x: Array, axis: str) -> Array:
    """Return this device's part [n / devices, ...] of the sum of x [n, ...] over the mesh axis.

    For `jax.shard_map`. XLA turns `lax.psum_scatter` over all devices of a slice of TPUs into a
    synchronous all-reduce of the whole, twice the traffic. There a ring of asynchronous permutes
    takes its place, which XLA overlaps with the operations that do not need the result.
    """
    devices = lax.axis_size(axis)
    if target_platform() == "tpu" and devices <= _MAX_RING:
        return ring_reduce_scatter(x, axis)
    return lax.psum_scatter(x, axis, tiled=True)


def ring_reduce_scatter(x: Array, axis: str) -> Array:
    """Return what `reduce_scatter` does, by permutes between neighbours in both directions."""
    devices, own = lax.axis_size(axis), lax.axis_index(axis)
    rows = len(x) // devices

    def ring(first: int, count: int, direction: int) -> Array:
        """Return the sum of `count` rows from row `first` on of this device's part."""

        def addend(step: int) -> Array:
            part = (own - step * direction) % devices
            return lax.dynamic_slice_in_dim(x, part * rows + first, count)

        to_next = [(i, (i + direction) % devices) for i in range(devices)]
        total = addend(1)
        for step in range(2, devices + 1):
            total = lax.ppermute(total, axis, to_next) + addend(step)
        return total

    half = rows // 2
    return jnp.concatenate([ring(0, half, 1), ring(half, rows - half, -1)])
