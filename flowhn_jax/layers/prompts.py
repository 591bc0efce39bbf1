"""Prompts of different lengths in one batch; decoding continues each one at its end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_NO_STEP = -1e9  # as dt before the softplus: the time step is exactly zero in float32


class Prompts(NamedTuple):
    """Rows of real tokens, each followed by padding. Decoding continues a row's last document.

    Attributes:
      lengths: [B] int32, real tokens of each row.
      first: [B] int32, tokens before the last document; equal to `lengths` if the row has no token
        of it, as in a branch that gets only earlier positions.
      segment_ids: [B, T] int32, padding counted to the last document; None: one document per row.
    """

    lengths: jax.Array
    first: jax.Array
    segment_ids: jax.Array | None

    def mask_padding(self, dt: jax.Array) -> jax.Array:
        """Return dt [B, T, ...], before the softplus, with time steps of zero at padding."""
        is_real = jnp.arange(dt.shape[1]) < self.lengths[:, None]
        return jnp.where(is_real[..., None], dt, _NO_STEP)

    def reset_state(self, state: jax.Array) -> jax.Array:
        """Return the final state [B, ...], zero in rows without tokens of the last document."""
        continues = (self.first < self.lengths).reshape(-1, *[1] * (state.ndim - 1))
        return jnp.where(continues, state, 0)

    def tail(self, x: jax.Array, count: int, prefix: int = 0) -> jax.Array:
        """Return the last `count` real tokens of x [B, T, E] as [B, count, E].

        If the last document has fewer, the row's first `prefix` tokens count as the ones before it,
        and zeros fill what is still missing.
        """
        positions = self.lengths[:, None] - count + jnp.arange(count)
        first = self.first[:, None]
        in_prefix = (positions < first) & (first > 0)
        positions = jnp.where(in_prefix, positions - first + prefix, positions)
        found = jnp.take_along_axis(x, jnp.maximum(positions, 0)[..., None], axis=1)
        return jnp.where((positions >= 0)[..., None], found, 0)

    def last(self, x: jax.Array) -> jax.Array:
        """Return each row's last real token [B, D] of x [B, T, D]."""
        return jnp.take_along_axis(x, self.lengths[:, None, None] - 1, axis=1)[:, 0]


def where_active(active: jax.Array | None, new: Any, old: Any) -> Any:
    """Return the `active` [B] rows of `new` and the other rows of `old`, trees of [B, ...]."""
    if active is None:
        return new

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def make_prompts(lengths: jax.Array, segment_ids: jax.Array | None) -> Prompts:
    """Return the prompts of rows with `lengths` [B] tokens and documents segment_ids [B, T].

    Args:
      lengths: at least 1 each.
      segment_ids: any values at padding; None: one document per row.
    """
    lengths = lengths.astype(jnp.int32)
    if segment_ids is None:
        return Prompts(lengths, jnp.zeros_like(lengths), None)
    is_real = jnp.arange(segment_ids.shape[1]) < lengths[:, None]
    current = jnp.take_along_axis(segment_ids, lengths[:, None] - 1, axis=1)
    first = (is_real & (segment_ids != current)).sum(1, dtype=jnp.int32)
    return Prompts(lengths, first, jnp.where(is_real, segment_ids, current))
