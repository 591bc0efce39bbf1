"""Grouped-query causal attention (arXiv 2305.13245), with what models add to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.documents import positions_after_prefix
from flowhn_jax.layers.linear import linear
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.layers.rope import rotate
from flowhn_jax.split.cost import score_flops
from kernels.attention import attention, attention_step


class KeysValues(NamedTuple):
    """Of a sequence, each [B, T, G, K]; in a cache [B, G, C, K], as its products want them."""

    k: jax.Array
    v: jax.Array


class KVCache(NamedTuple):
    """Keys and values of the tokens that later ones may see.

    Attributes:
      kept: [B, G, C, K]; with a window the places behind the prefix are used in turns.
      tokens: [B] int32, how many there were.
      first: [B] int32, how many of them were of other documents, which no later one sees.
    """

    kept: KeysValues
    tokens: jax.Array
    first: jax.Array


class Attention(nnx.Module):
    """Causal attention over the tokens it is given: H query heads, G key-value heads, size K.

    Without `rope_theta` there are no positions, as in Jamba (arXiv 2403.19887). With `window` a
    token sees so many positions, its own included, and the first `prefix` ones. With `borrows` the
    layer has no keys and values of its own, without `projects` no output projection: then it gives
    the heads' results, [..., H * K].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        init_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        rope_theta: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        key_multiplier: float = 1.0,
        borrows: bool = False,
        projects: bool = True,
    ):
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.rope_theta, self.window, self.prefix = rope_theta, window, prefix
        self.key_multiplier, self.borrows, self.projects = key_multiplier, borrows, projects
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.q_proj = linear(width, heads * head_dim, **kwargs)
        if not borrows:
            self.k_proj = linear(width, kv_heads * head_dim, **kwargs)
            self.v_proj = linear(width, kv_heads * head_dim, **kwargs)
        if projects:
            self.o_proj = linear(heads * head_dim, width, **kwargs)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        keys_values: KeysValues | None = None,
    ) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]; only tokens of one segment see another.

        `keys_values` are those of another layer for the same tokens, where this one has none.
        """
        q = self._rotated(self._heads(self.q_proj(x)), self._positions(x, segment_ids))
        k, v = self.keys_values(x, segment_ids) if keys_values is None else keys_values
        options = dict(window=self.window, prefix=self.prefix)
        return self._out(attention(q, k, v, segment_ids=segment_ids, **options))

    def keys_values(self, x: jax.Array, segment_ids: jax.Array | None = None) -> KeysValues:
        """Return those of x [B, T, D], from position 0 on, or from the prefix in each document."""
        return self._keys_values(x, self._positions(x, segment_ids))

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens a sequence."""
        if self.window is not None:
            length = min(length, self.prefix + self.window)
        empty = jnp.zeros((batch, self.kv_heads, length, self.head_dim), self.dtype)
        none = jnp.zeros(batch, jnp.int32)
        return KVCache(KeysValues(empty, empty), none, none)

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, KVCache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row's tokens, for `length` of them)."""
        keys_values = self.keys_values(x, prompts.segment_ids)
        attended = self(x, prompts.segment_ids, keys_values)
        return attended, self.cached(keys_values, prompts, length)

    def cached(self, keys_values: KeysValues, prompts: Prompts, length: int) -> KVCache:
        """The cache behind each row's tokens, of keys and values [B, T, G, K]."""
        empty = self.init_cache(keys_values.k.shape[0], length).kept
        places, tokens = empty.k.shape[2], keys_values.k.shape[1]
        if self.window is not None and tokens > places:
            held = jnp.maximum(self._held(prompts.lengths, places), 0)[:, :, None, None]
            keys_values = jax.tree.map(lambda x: jnp.take_along_axis(x, held, 1), keys_values)

        def place(empty: jax.Array, found: jax.Array) -> jax.Array:
            found = jnp.swapaxes(found[:, :places], 1, 2).astype(empty.dtype)
            return empty.at[:, :, : found.shape[2]].set(found)

        return KVCache(jax.tree.map(place, empty, keys_values), prompts.lengths, prompts.first)

    def extend(self, x: jax.Array, cache: KVCache, active: jax.Array | None = None) -> KVCache:
        """The cache with one more token of each sequence, x [B, D], or of those `active` [B]."""
        (k, v), tokens, first = cache
        place = tokens
        if self.window is not None:
            behind = tokens - self.prefix
            place = jnp.where(behind < 0, tokens, self.prefix + behind % self.window)
        new = self._keys_values(x, self._step_positions(tokens, first))
        if active is not None:
            place = jnp.where(active, place, k.shape[2])  # beyond the last place: left out
        rows = jnp.arange(x.shape[0])
        kept = (
            old.at[rows, :, place].set(added, mode="drop")
            for old, added in zip((k, v), new, strict=True)
        )
        return KVCache(KeysValues(*kept), tokens + (1 if active is None else active), first)

    def attend_last(self, x: jax.Array, cache: KVCache) -> jax.Array:
        """x [B, D], the token that the cache was extended by last -> [B, D]."""
        (k, v), tokens, first = cache
        positions = self._step_positions(tokens - 1, first)
        q = self._rotated(self._heads(self.q_proj(x)), positions)
        held = self._held(tokens, k.shape[2])
        visible = (held < tokens[:, None]) & ((held >= first[:, None]) | (held < self.prefix))
        return self._out(attention_step(q, k, v, visible))

    def step(
        self, x: jax.Array, cache: KVCache, active: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache with it).

        A sequence that is not `active` [B] keeps its cache; its output means nothing.
        """
        cache = self.extend(x, cache, active)
        return self.attend_last(x, cache), cache

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """FLOPs of a sequence but for its projections' (see `split.cost.score_flops`)."""
        sight = dict(causal=causal, window=self.window, prefix=self.prefix)
        return score_flops(self.heads * self.head_dim, tokens, **sight)

    def _held(self, tokens: jax.Array, places: int) -> jax.Array:
        """[B, places], the last position before `tokens` [B] that was put into each place.

        A place that is still empty has its first position, which is none before `tokens`.
        """
        place = jnp.broadcast_to(jnp.arange(places), (tokens.shape[0], places))
        if self.window is None:
            return place
        turns = jnp.maximum(tokens[:, None] - 1 - place, 0) // self.window
        return jnp.where(place < self.prefix, place, place + turns * self.window)

    def _positions(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Return the positions [T] or [B, T] of x [B, T, D].

        A prefix is as far from every document's first token; without one only differences count.
        """
        if not self.prefix or segment_ids is None:
            return jnp.arange(x.shape[1])
        return positions_after_prefix(segment_ids, self.prefix)

    def _step_positions(self, tokens: jax.Array, first: jax.Array) -> jax.Array:
        """Return the positions [B] of tokens after `tokens` [B], `first` [B] of other documents."""
        if not self.prefix:
            return tokens
        return jnp.where(first > 0, tokens - first + self.prefix, tokens)

    def _heads(self, projected: jax.Array) -> jax.Array:
        return projected.reshape(*projected.shape[:-1], -1, self.head_dim)

    def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x if self.rope_theta is None else rotate(x, positions, self.rope_theta)

    def _keys_values(self, x: jax.Array, positions: jax.Array) -> KeysValues:
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return KeysValues(self._rotated(k * self.key_multiplier, positions), v)

    def _out(self, heads: jax.Array) -> jax.Array:
        joined = heads.reshape(*heads.shape[:-2], -1)
        return self.o_proj(joined) if self.projects else joined
