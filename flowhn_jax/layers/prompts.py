"""Prompts of different lengths side by side, whose ends the caches of decoding begin from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_NO_STEP = -1e9  # a time step before the softplus whose step is exactly zero, in float32


class Prompts(NamedTuple):
    """Rows of tokens, each followed by padding, whose last document goes on behind them.

    Attributes:
      lengths: [B] int32, real tokens of each row.
      first: [B] int32, tokens before the last document; `lengths` where it has none here.
      segment_ids: [B, T] int32, the last document's for padding; None: one document a row.
    """

    lengths: jax.Array
    first: jax.Array
    segment_ids: jax.Array | None

    def mask_padding(self, dt: jax.Array) -> jax.Array:
        """dt [B, T, ...] before the softplus, such that padding leaves a state as it was."""
        real = jnp.arange(dt.shape[1]) < self.lengths[:, None]
        return jnp.where(real[..., None], dt, _NO_STEP)

    def reset_state(self, state: jax.Array) -> jax.Array:
        """state [B, ...] behind the last tokens; zero where they are of another document."""
        goes_on = (self.first < self.lengths).reshape(-1, *[1] * (state.ndim - 1))
        return jnp.where(goes_on, state, 0)

    def tail(self, x: jax.Array, count: int, prefix: int = 0) -> jax.Array:
        """Return the last `count` tokens of x [B, T, E] as [B, count, E].

        Before the last document's first token are the last of the first `prefix` tokens, and zeros
        before these.
        """
        places = self.lengths[:, None] - count + jnp.arange(count)
        first = self.first[:, None]
        in_prefix = (places < first) & (first > 0)
        places = jnp.where(in_prefix, places - first + prefix, places)
        found = jnp.take_along_axis(x, jnp.maximum(places, 0)[..., None], axis=1)
        return jnp.where((places >= 0)[..., None], found, 0)

    def last(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, D] of each row's last token."""
        return jnp.take_along_axis(x, self.lengths[:, None, None] - 1, axis=1)[:, 0]


def where_active(active: jax.Array | None, new: Any, old: Any) -> Any:
    """The `active` [B] rows of `new` and the others of `old`: trees of arrays [B, ...]."""
    if active is None:
        return new

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def make_prompts(lengths: jax.Array, segment_ids: jax.Array | None) -> Prompts:
    """Of rows of `lengths` [B] tokens, at least one each, and documents segment_ids [B, T]."""
    lengths = lengths.astype(jnp.int32)
    if segment_ids is None:
        return Prompts(lengths, jnp.zeros_like(lengths), None)
    real = jnp.arange(segment_ids.shape[1]) < lengths[:, None]
    current = jnp.take_along_axis(segment_ids, lengths[:, None] - 1, axis=1)
    first = (real & (segment_ids != current)).sum(1, dtype=jnp.int32)
    return Prompts(lengths, first, jnp.where(real, segment_ids, current))
