"""Sequences cut over devices: what the positions of one device need of those before them.

For use inside `jax.shard_map`, where each device holds a run of positions, in order along `axes`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Axes = tuple[str, ...]


def before(x: Array, count: int, axes: Axes) -> Array:
    """The last `count` positions of the device before, [B, count, ...]; zeros on the first one.

    Args:
      x: [B, L, ...], L at least `count`.
      count: positions.
      axes: those of the mesh that positions are cut over.
    """
    devices = lax.axis_size(axes)
    pairs = [(i, i + 1) for i in range(devices - 1)]
    return lax.ppermute(x[:, x.shape[1] - count :], axes, pairs)


def starts_document(segment_ids: Array, axes: Axes) -> Array:
    """Whether the first position is of another document than the one before it, [B] bool.

    False on the first device: what is before it is of its document.
    """
    differs = before(segment_ids, 1, axes)[:, 0] != segment_ids[:, 0]
    return differs & (lax.axis_index(axes) > 0)


def over_sequence(
    run: Callable[..., tuple[Array, Array]], *arguments_and_axes: Array | Axes | None
) -> tuple[Array, Array]:
    """A state-space operation on this device's positions, from the state that reaches them.

    Each device runs its positions from a state of zero; the devices exchange what they came to and
    how much of an earlier state they leave; and each runs again from the state that reaches it.
    That is twice the work of the recurrence, which is little beside the products around it, and no
    device waits for the ones before.

    Args:
      run: `kernels.selective_scan` or `kernels.ssd` on one device.
      *arguments_and_axes: its arguments x, dt [B, L, E], A [E, ...], ..., dt_bias, segment_ids and
        initial_state [B, E, ...], and the axes that positions are cut over. Where there are none it
        is just run.

    Returns:
      This device's outputs, and on each device the state behind the last device's positions.
    """
    *arguments, axes = arguments_and_axes
    if not axes:
        return run(*arguments)
    *others, initial_state = arguments
    _, dt, A, *_, dt_bias, segment_ids = others
    own = run(*others, None)[1]
    dt = dt.astype(jnp.float32)
    delta = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(jnp.float32)).sum(1)
    kept = jnp.exp(_ranked(delta, A.ndim + 1) * A.astype(jnp.float32))  # of a state before
    is_new = None
    if segment_ids is not None:
        is_new = starts_document(segment_ids, axes)
        is_reset = is_new | (segment_ids[:, 1:] != segment_ids[:, :-1]).any(1)
        kept = jnp.where(_ranked(is_reset, kept.ndim), 0, kept)
    states, kept = lax.all_gather((own, _ranked(kept, own.ndim)), axes)
    reaching = [jnp.zeros_like(own) if initial_state is None else initial_state]
    for i in range(len(states)):
        reaching.append(states[i] + kept[i] * reaching[-1])
    mine = jnp.stack(reaching)[lax.axis_index(axes)]
    if is_new is not None:
        mine = jnp.where(_ranked(is_new, mine.ndim), 0, mine)
    return run(*others, mine)[0], reaching[-1]


def _ranked(x: Array, rank: int) -> Array:
    """x with dimensions of one behind its own."""
    return x.reshape(*x.shape, *(1,) * (rank - x.ndim))
