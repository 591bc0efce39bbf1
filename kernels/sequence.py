"""Sequences sharded over devices: what the positions of one device need of those before them.

For use inside `jax.shard_map`, where each device holds a run of positions, in order along `axes`.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from kernels.partition import over_mesh
from kernels.scan_inputs import ScanInputs, time_steps

Axes = tuple[str, ...]


def halo_before(x: Array, count: int, axes: Axes) -> Array:
    """Return the last `count` positions of the previous device, [B, count, ...].

    The first device gets zeros.

    Args:
      x: [B, L, ...], L at least `count`.
      count: number of positions.
      axes: mesh axes that positions are sharded over.
    """
    devices = lax.axis_size(axes)
    pairs = [(i, i + 1) for i in range(devices - 1)]
    return lax.ppermute(x[:, x.shape[1] - count :], axes, pairs)


def starts_document(segment_ids: Array, axes: Axes) -> Array:
    """Return whether the first position begins another document than the one before it, [B] bool.

    False on the first device, whose initial state belongs to its first document.
    """
    differs = halo_before(segment_ids, 1, axes)[:, 0] != segment_ids[:, 0]
    return differs & (lax.axis_index(axes) > 0)


def scan_over_mesh(
    run: Callable[[ScanInputs], tuple[Array, Array]],
    inputs: ScanInputs,
    layouts: Sequence[str],
    out_layouts: tuple[str, str],
) -> tuple[Array, Array]:
    """Run a state-space scan on the devices of the mesh that is set.

    Args:
      run: the scan on one device, (y, final state) from the inputs.
      inputs: the inputs of all devices.
      layouts: the layouts of each input, as in `kernels.partition.over_mesh`.
      out_layouts: the layouts of y and of the final state.
    """

    def on_device(*arrays_and_axes):
        *arrays, axes = arrays_and_axes
        return over_sequence(run, ScanInputs(*arrays), axes)

    return over_mesh(on_device, layouts, out_layouts, axes_of=("L",))(*inputs)


def over_sequence(
    run: Callable[[ScanInputs], tuple[Array, Array]], inputs: ScanInputs, axes: Axes
) -> tuple[Array, Array]:
    """Run a state-space scan on this device's positions, from the state that reaches them.

    Each device runs its positions from a state of zero; the devices exchange the resulting states
    and the factors by which they decay an earlier state; each device then runs again from the
    state that reaches it. That is twice the work of the recurrence, which is little compared with
    the products around it, and no device waits for the ones before it.

    Args:
      run: the scan on one device, (y, final state) from the inputs.
      inputs: this device's.
      axes: mesh axes that positions are sharded over; if there are none, the scan is just run.

    Returns:
      This device's outputs, and on every device the state after the last device's positions.
    """
    if not axes:
        return run(inputs)
    A, segment_ids, initial_state = inputs.A, inputs.segment_ids, inputs.initial_state
    own = run(inputs._replace(initial_state=None))[1]
    delta = time_steps(inputs.dt, inputs.dt_bias).sum(1)
    decay = jnp.exp(_with_rank(delta, A.ndim + 1) * A.astype(jnp.float32))  # of an earlier state
    is_new = None
    if segment_ids is not None:
        is_new = starts_document(segment_ids, axes)
        is_reset = is_new | (segment_ids[:, 1:] != segment_ids[:, :-1]).any(1)
        decay = jnp.where(_with_rank(is_reset, decay.ndim), 0, decay)
    states, decays = lax.all_gather((own, _with_rank(decay, own.ndim)), axes)
    reaching = [jnp.zeros_like(own) if initial_state is None else initial_state]
    for i in range(len(states)):
        reaching.append(states[i] + decays[i] * reaching[-1])
    mine = jnp.stack(reaching)[lax.axis_index(axes)]
    if is_new is not None:
        mine = jnp.where(_with_rank(is_new, mine.ndim), 0, mine)
    return run(inputs._replace(initial_state=mine))[0], reaching[-1]


def _with_rank(x: Array, rank: int) -> Array:
    """Return x with trailing dimensions of size 1 up to a rank."""
    return x.reshape(*x.shape, *(1,) * (rank - x.ndim))
