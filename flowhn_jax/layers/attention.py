"""Grouped-query causal attention (arXiv 2305.13245), with the options that the models need."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.documents import positions_after_prefix
from flowhn_jax.layers.linear import linear, linear_from_heads, linear_to_heads, rms_norm
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.layers.rope import UNSCALED, RopeScaling, rotate
from flowhn_jax.split import Selection, take
from flowhn_jax.split.cost import score_flops
from kernels.attention import attention, attention_step, padded_length


class AttentionSizes(NamedTuple):
    """Sizes of an attention layer: D, H, G and K."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class KeysValues(NamedTuple):
    """Keys and values: [B, T, G, K] of a sequence, [B, G, C, K] in a cache of C slots.

    With the cache's layout, a decode step needs no transpose.
    """

    k: jax.Array
    v: jax.Array


class KVCache(NamedTuple):
    """Keys and values of the tokens that later ones may attend to.

    Attributes:
      kv: [B, G, C, K] each. With a window, the slots after those of the prefix are a ring buffer.
      tokens: [B] int32, tokens so far.
      first: [B] int32, tokens before the current document, the prefix included; 0 in a row's first
        document. Of these tokens, later ones attend only to those of the prefix.
    """

    kv: KeysValues
    tokens: jax.Array
    first: jax.Array


class Attention(nnx.Module):
    """Causal attention with H query heads and G key-value heads of size K (a `Mixer`).

    Options:
      rope_theta: base of the rotary frequencies; None: no position encoding, as in Jamba (arXiv
        2403.19887).
      rope_scaling: changes the rotary frequencies.
      window: number of positions that a token attends to, its own included; None: all.
      prefix: number of leading positions that every token attends to, whatever the window.
      key_multiplier: factor on the keys.
      borrows: True: no projections to keys and values; the caller passes another layer's.
      projects: False: no output projection; the result is the heads' outputs, [..., H * K].
      qk_norm: True: RMS norms of each head's queries and keys, before their rotation.
      bias: 'none', 'qkv' for biases of queries, keys and values, or 'all' for the output's as well.
    """

    def __init__(
        self,
        sizes: AttentionSizes,
        context: LayerContext,
        *,
        rope_theta: float | None = None,
        rope_scaling: RopeScaling = UNSCALED,
        window: int | None = None,
        prefix: int = 0,
        key_multiplier: float = 1.0,
        borrows: bool = False,
        projects: bool = True,
        qk_norm: bool = False,
        bias: str = "none",
    ):
        width, heads, kv_heads, head_dim = sizes
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dtype = context.dtype
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.window, self.prefix = window, prefix
        self.key_multiplier, self.borrows, self.projects = key_multiplier, borrows, projects
        self.qk_norm = qk_norm
        of_inputs = bias != "none"
        self.q_proj = linear(width, heads * head_dim, context, bias=of_inputs)
        if not borrows:
            self.k_proj = linear(width, kv_heads * head_dim, context, bias=of_inputs)
            self.v_proj = linear(width, kv_heads * head_dim, context, bias=of_inputs)
        if projects:
            self.o_proj = linear(heads * head_dim, width, context, bias=bias == "all")
        if qk_norm:
            self.q_norm = rms_norm(head_dim, context)
            if not borrows:
                self.k_norm = rms_norm(head_dim, context)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        keys_values: KeysValues | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Return attention's outputs [B, T, D] for x [B, T, D].

        Args:
          x: [B, T, D].
          segment_ids: [B, T] int32; documents never attend to each other. None: one document.
          keys_values: keys and values of x, from `keys_values` of this or another layer; None:
            compute them.
          positions: [T] or [B, T] int32, ascending, for the rotation; None: those of consecutive
            tokens.
        """
        length = x.shape[1]
        if keys_values is None:
            tail = padded_length(length, self.dtype, prefix=self.prefix) - length
            x = jnp.pad(x, ((0, 0), (0, tail), (0, 0)))
            if segment_ids is not None:
                segment_ids = jnp.pad(segment_ids, ((0, 0), (0, tail)))
            if positions is not None:
                rows = [(0, 0)] * (positions.ndim - 1)
                positions = jnp.pad(positions, (*rows, (0, tail)))
        if positions is None:
            positions = self._positions(x, segment_ids)
        if keys_values is None:
            keys_values = self._keys_values(x, positions, length)
        # The kernel of q_proj takes the scores' factor, unless a norm follows it.
        scale = self.head_dim**-0.5
        q = self._queries(x, positions, length, scale=scale)
        y = attention(
            q,
            *keys_values,
            segment_ids=segment_ids,
            window=self.window,
            prefix=self.prefix,
            scale=scale if self.qk_norm else 1.0,
        )
        return self._project_out(y)[:, :length]

    def mix_selected(
        self, x: jax.Array, segment_ids: jax.Array | None, selection: Selection
    ) -> jax.Array:
        """Return the outputs for `selection`, [B, count, D]; x [B, T, D] are all tokens."""
        return self._attend_selected(x, segment_ids, self.keys_values(x, segment_ids), selection)

    def prefill_selected(
        self, x: jax.Array, prompts: Prompts, length: int, selection: Selection
    ) -> tuple[jax.Array, KVCache]:
        """Return the outputs for `selection`, and the cache after each row's tokens."""
        keys_values = self.keys_values(x, prompts.segment_ids)
        cache = self.fill_cache(keys_values, prompts, length)
        return self._attend_selected(x, prompts.segment_ids, keys_values, selection), cache

    def read(self, x: jax.Array, cache: KVCache) -> tuple[Callable[[], jax.Array], KVCache]:
        """Return a function that attends from the tokens x [B, D], and the cache with them."""
        new_cache = self.extend(x, cache)
        return lambda: self.attend_last(x, new_cache), new_cache

    def selected_share(self, name: str) -> float:
        """Return 1 for queries, scores ('mixing') and outputs, 0 for keys and values."""
        return float(name in ("q_proj", "mixing", "o_proj"))

    def keys_values(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> KeysValues:
        """Return keys and values [B, T, G, K] of x [B, T, D].

        Without `positions` [T] or [B, T], the first token has position 0 and the others follow it.
        """
        if positions is None:
            positions = self._positions(x, segment_ids)
        return self._keys_values(x, positions, x.shape[1])

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Return an empty cache of `batch` sequences, with slots for `length` tokens each.

        Raises:
          ValueError: `length` is beyond the original context of dynamic rotary scaling. Keys would
            then be rotated with different frequencies, by the length at which they came.
        """
        original = self.rope_scaling.original_context
        if self.rope_scaling.type == "dynamic" and original is not None and length > original:
            raise ValueError(
                "The tokens to decode must be at most model.rope_scaling.original_context "
                f"({original}) for dynamic scaling; got {length}."
            )
        if self.window is not None:
            length = min(length, self.prefix + self.window)
        empty = jnp.zeros((batch, self.kv_heads, length, self.head_dim), self.dtype)
        none = jnp.zeros(batch, jnp.int32)
        return KVCache(KeysValues(empty, empty), none, none)

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, positions: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Return the outputs [B, T, D], and the cache after each row's tokens.

        Positions are as in `__call__`.
        """
        keys_values = self.keys_values(x, prompts.segment_ids, positions)
        attended = self(x, prompts.segment_ids, keys_values, positions)
        return attended, self.fill_cache(keys_values, prompts, length)

    def fill_cache(self, keys_values: KeysValues, prompts: Prompts, length: int) -> KVCache:
        """Return the cache after each row's tokens, given their keys and values [B, T, G, K]."""
        empty = self.init_cache(keys_values.k.shape[0], length).kv
        slots, tokens = empty.k.shape[2], keys_values.k.shape[1]
        k, v = keys_values
        if self.window is not None and tokens > slots:
            positions = jnp.maximum(self._slot_positions(prompts.lengths, slots), 0)
            positions = positions[:, :, None, None]
            k, v = jnp.take_along_axis(k, positions, 1), jnp.take_along_axis(v, positions, 1)

        def put(empty: jax.Array, found: jax.Array) -> jax.Array:
            found = jnp.swapaxes(found[:, :slots], 1, 2).astype(empty.dtype)
            return empty.at[:, :, : found.shape[2]].set(found)

        kv = KeysValues(put(empty.k, k), put(empty.v, v))
        return KVCache(kv, prompts.lengths, prompts.first)

    def extend(
        self,
        x: jax.Array,
        cache: KVCache,
        active: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> KVCache:
        """Return the cache with token x [B, D] appended to each `active` [B] sequence.

        Without `positions` [B], the tokens' positions follow those in the cache.
        """
        (k, v), tokens, first = cache
        slot = tokens
        if self.window is not None:
            after_prefix = tokens - self.prefix
            slot = jnp.where(after_prefix < 0, tokens, self.prefix + after_prefix % self.window)
        if positions is None:
            positions = self._step_positions(tokens, first)
        new_k, new_v = self._keys_values(x, positions, 0)
        if active is not None:
            slot = jnp.where(active, slot, k.shape[2])  # out of bounds: the update is dropped
        rows = jnp.arange(x.shape[0])
        k = k.at[rows, :, slot].set(new_k, mode="drop")
        v = v.at[rows, :, slot].set(new_v, mode="drop")
        return KVCache(KeysValues(k, v), tokens + (1 if active is None else active), first)

    def attend_last(
        self, x: jax.Array, cache: KVCache, positions: jax.Array | None = None
    ) -> jax.Array:
        """Return the output [B, D] for x [B, D], the token that `extend` has just added."""
        (k, v), tokens, first = cache
        if positions is None:
            positions = self._step_positions(tokens - 1, first)
        q = self._queries(x, positions, 0)
        slot_positions = self._slot_positions(tokens, k.shape[2])
        is_current = (slot_positions >= first[:, None]) | (slot_positions < self.prefix)
        visible = (slot_positions < tokens[:, None]) & is_current
        return self._project_out(attention_step(q, k, v, visible))

    def step(
        self,
        x: jax.Array,
        cache: KVCache,
        active: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Return the output of each sequence's token [B, D], and the resulting cache.

        A sequence that is not `active` [B] keeps its cache; its output is undefined. Positions [B]
        are as in `extend`.
        """
        new_cache = self.extend(x, cache, active, positions)
        return self.attend_last(x, new_cache, positions), new_cache

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of the scores and of their product with the values."""
        width = self.heads * self.head_dim
        return score_flops(width, tokens, causal=causal, window=self.window, prefix=self.prefix)

    def _slot_positions(self, tokens: jax.Array, slots: int) -> jax.Array:
        """Return the position of the token in each slot after `tokens` [B] tokens, [B, slots].

        An empty slot gets the position of the first token that will be written to it, so all empty
        slots have positions of at least `tokens`.
        """
        slot = jnp.broadcast_to(jnp.arange(slots), (tokens.shape[0], slots))
        if self.window is None:
            return slot
        rounds = jnp.maximum(tokens[:, None] - 1 - slot, 0) // self.window
        return jnp.where(slot < self.prefix, slot, slot + rounds * self.window)

    def _attend_selected(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        keys_values: KeysValues,
        selection: Selection,
    ) -> jax.Array:
        length, scale = x.shape[1], self.head_dim**-0.5
        positions = take(jnp.arange(length)[None], selection)[0]
        q = self._queries(take(x, selection), positions, length, scale=scale)
        y = attention(
            q,
            *keys_values,
            segment_ids=segment_ids,
            queries=selection.positions(length),
            scale=scale if self.qk_norm else 1.0,
        )
        return self._project_out(y)

    def _positions(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Return the positions [T] or [B, T] of x [B, T, D].

        With a prefix, the positions of every document continue those of the prefix. Without one,
        only differences within a document matter, so positions count through the row.
        """
        if not self.prefix or segment_ids is None:
            return jnp.arange(x.shape[1])
        return positions_after_prefix(segment_ids, self.prefix)

    def _step_positions(self, tokens: jax.Array, first: jax.Array) -> jax.Array:
        """Return the position [B] of the token that follows the first `tokens` [B] of each row.

        Args:
          tokens: [B], earlier documents included.
          first: [B], as in `KVCache`.
        """
        if not self.prefix:
            return tokens
        return jnp.where(first > 0, tokens - first + self.prefix, tokens)

    def _rotate(self, x: jax.Array, positions: jax.Array, length: int) -> jax.Array:
        if self.rope_theta is None:
            return x
        return rotate(x, positions, self.rope_theta, self.rope_scaling, length)

    def _queries(
        self, x: jax.Array, positions: jax.Array, length: int, *, scale: float = 1.0
    ) -> jax.Array:
        """Return the queries of x, times `scale` unless they are normalized.

        Args:
          x: [B, T, D] or [B, D].
          positions: the positions of x's tokens.
          length: tokens of a row, padding not included; 0 in a decode step.
          scale: factor.
        """
        if self.qk_norm:
            q = self.q_norm(linear_to_heads(self.q_proj, x, self.head_dim))
        else:
            q = linear_to_heads(self.q_proj, x, self.head_dim, scale=scale)
        return self._rotate(q, positions, length)

    def _keys_values(self, x: jax.Array, positions: jax.Array, length: int) -> KeysValues:
        k, v = (linear_to_heads(layer, x, self.head_dim) for layer in (self.k_proj, self.v_proj))
        if self.qk_norm:
            k = self.k_norm(k)
        return KeysValues(self._rotate(k * self.key_multiplier, positions, length), v)

    def _project_out(self, heads: jax.Array) -> jax.Array:
        if self.projects:
            return linear_from_heads(self.o_proj, heads)
        return heads.reshape(*heads.shape[:-2], -1)
