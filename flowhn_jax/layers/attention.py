"""Grouped-query causal attention (arXiv 2305.13245), with what models add to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear
from flowhn_jax.layers.rope import rotate
from flowhn_jax.split.cost import score_flops
from kernels.attention import attention, attention_step


class KeysValues(NamedTuple):
    """Of a sequence, each [B, T, G, K]."""

    k: jax.Array
    v: jax.Array


class KVCache(NamedTuple):
    """Keys and values of the tokens that later ones may see.

    Attributes:
      kept: [B, C, G, K]; with a window the places behind the prefix are used in turns.
      tokens: [B] int32, how many there were.
    """

    kept: KeysValues
    tokens: jax.Array


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
        positions = jnp.arange(x.shape[1])
        q = self._rotated(self._heads(self.q_proj(x)), positions)
        k, v = self.keys_values(x) if keys_values is None else keys_values
        options = dict(window=self.window, prefix=self.prefix)
        return self._out(attention(q, k, v, segment_ids=segment_ids, **options))

    def keys_values(self, x: jax.Array) -> KeysValues:
        """Of x [B, T, D], from position 0 on."""
        return self._keys_values(x, jnp.arange(x.shape[1]))

    def init_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` tokens a sequence."""
        if self.window is not None:
            length = min(length, self.prefix + self.window)
        empty = jnp.zeros((batch, length, self.kv_heads, self.head_dim), self.dtype)
        return KVCache(KeysValues(empty, empty), jnp.zeros(batch, jnp.int32))

    def extend(self, x: jax.Array, cache: KVCache) -> KVCache:
        """The cache with one more token of each sequence, x [B, D]."""
        (k, v), tokens = cache
        place = tokens
        if self.window is not None:
            behind = tokens - self.prefix
            place = jnp.where(behind < 0, tokens, self.prefix + behind % self.window)
        new = self._keys_values(x, tokens)
        rows = jnp.arange(x.shape[0])
        kept = KeysValues(k.at[rows, place].set(new.k), v.at[rows, place].set(new.v))
        return KVCache(kept, tokens + 1)

    def attend_last(self, x: jax.Array, cache: KVCache) -> jax.Array:
        """x [B, D], the token that the cache was extended by last -> [B, D]."""
        (k, v), tokens = cache
        q = self._rotated(self._heads(self.q_proj(x)), tokens - 1)
        visible = jnp.arange(k.shape[1]) < tokens[:, None]
        return self._out(attention_step(q, k, v, visible))

    def step(self, x: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache with it)."""
        cache = self.extend(x, cache)
        return self.attend_last(x, cache), cache

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """FLOPs of a sequence but for its projections' (see `split.cost.score_flops`)."""
        sight = dict(causal=causal, window=self.window, prefix=self.prefix)
        return score_flops(self.heads * self.head_dim, tokens, **sight)

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
