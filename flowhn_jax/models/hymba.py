"""Hymba (arXiv 2411.13676): attention and Mamba heads in parallel on the same tokens of a layer.

Both give E channels, which are normed and averaged with learned scales before one output projection
(equation 4). Learned meta tokens stand before every sequence (section 2.4). Attention has a window
but in the first, middle and last layer, and two layers with windows that follow each other share
keys and values (section 2.3). In a packed sequence the meta tokens stand once, and every document
begins after them: from their state and inputs, and at the same distance from their keys.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.attention import KeysValues, KVCache
from flowhn_jax.layers.decoder import DecoderLayer, attention, compute_dtype, mamba1
from flowhn_jax.layers.linear import linear, rms_norm
from flowhn_jax.layers.mamba1 import Mamba1Cache
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.language_model import STREAM, LanguageModel, checkpointed
from kernels.partition import constrain


def is_global(index: int, layers: int) -> bool:
    """Whether attention of layer `index` sees the whole past."""
    return index in (0, layers // 2, layers - 1)


def borrows(index: int, layers: int) -> bool:
    """Whether layer `index` takes the keys and values of the layer before it."""
    windowed_before = 0
    while windowed_before < index and not is_global(index - windowed_before - 1, layers):
        windowed_before += 1
    return not is_global(index, layers) and windowed_before % 2 == 1


class HymbaCache(NamedTuple):
    """What a layer keeps; no keys and values where it takes another layer's."""

    attention: KVCache | None
    ssm: Mamba1Cache


class HybridHeads(nnx.Module):
    """The mean of the normed outputs of attention and Mamba heads, E channels each, projected."""

    def __init__(self, config: ModelConfig, index: int, rngs: nnx.Rngs):
        layers, inner, dtype = config.blocks, config.inner, compute_dtype(config)
        self.attention = attention(
            config,
            rngs,
            rope_theta=config.rope_theta,
            window=None if is_global(index, layers) else config.window,
            prefix=config.meta_tokens,
            borrows=borrows(index, layers),
            projects=False,
        )
        self.ssm = mamba1(config, rngs, projects=False, prefix=config.meta_tokens)
        norm = dict(epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention_norm, self.ssm_norm = rms_norm(inner, **norm), rms_norm(inner, **norm)
        kwargs = dict(init_std=config.init_std, dtype=dtype, rngs=rngs)
        self.out_proj = linear(inner, config.width, **kwargs)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, keys_values: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] -> ([B, T, D], keys and values: its own, or those given where it borrows)."""
        if not self.attention.borrows:
            keys_values = self.attention.keys_values(x, segment_ids)
        attended = self.attention(x, segment_ids, keys_values)
        return self._fused(attended, self.ssm(x, segment_ids)), keys_values

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, keys_values: KeysValues | None
    ) -> tuple[jax.Array, HymbaCache, KeysValues]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row, keys and values as of a call)."""
        own = None
        if not self.attention.borrows:
            keys_values = self.attention.keys_values(x, prompts.segment_ids)
            own = self.attention.cached(keys_values, prompts, length)
        attended = self.attention(x, prompts.segment_ids, keys_values)
        ssm, of_ssm = self.ssm.prefill(x, prompts, length)
        return self._fused(attended, ssm), HymbaCache(own, of_ssm), keys_values

    def step(
        self, x: jax.Array, cache: HymbaCache, before: KVCache | None
    ) -> tuple[jax.Array, HymbaCache, KVCache]:
        """x [B, D] -> ([B, D], the cache, its keys and values, or `before` where it borrows)."""
        borrows = self.attention.borrows
        own = None if borrows else self.attention.extend(x, cache.attention)
        seen = before if borrows else own
        ssm, of_ssm = self.ssm.step(x, cache.ssm)
        mixed = self._fused(self.attention.attend_last(x, seen), ssm)
        return mixed, HymbaCache(own, of_ssm), seen

    def _fused(self, attended: jax.Array, ssm: jax.Array) -> jax.Array:
        return self.out_proj((self.attention_norm(attended) + self.ssm_norm(ssm)) / 2)


class HymbaLayer(DecoderLayer):
    """A decoder layer that passes keys and values on."""

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, keys_values: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D], segment_ids [B, T] -> ([B, T, D], keys and values for the next layer)."""
        mixed, keys_values = self.mixer(self.norm(x), segment_ids, keys_values)
        return constrain(self.feed(x + mixed), STREAM), keys_values

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, keys_values: KeysValues | None
    ) -> tuple[jax.Array, HymbaCache, KeysValues]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row, keys and values as of a call)."""
        mixed, cache, keys_values = self.mixer.prefill(self.norm(x), prompts, length, keys_values)
        return constrain(self.feed(x + mixed), STREAM), cache, keys_values

    def step(
        self, x: jax.Array, cache: HymbaCache, before: KVCache | None
    ) -> tuple[jax.Array, HymbaCache, KVCache]:
        """x [B, D] -> ([B, D], the cache, keys and values that the next layer may borrow)."""
        mixed, cache, seen = self.mixer.step(self.norm(x), cache, before)
        return self.feed(x + mixed), cache, seen


class Hymba(LanguageModel):
    """Hybrid-head layers behind learned meta tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        shape = config.meta_tokens, config.width
        self.meta = nnx.Param(config.init_std * jax.random.normal(rngs.params(), shape))

    def block(self, index: int, rngs: nnx.Rngs) -> HymbaLayer:
        """Layer `index`, by its place among those with windows."""
        return HymbaLayer(self.config, HybridHeads(self.config, index, rngs), rngs)

    def apply_blocks(self, x: jax.Array, segment_ids: jax.Array | None, remat: str) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        count = self.config.meta_tokens
        x = self._behind_meta(x)
        if segment_ids is not None:
            segment_ids = _with_meta(segment_ids, count)
        keys_values = None
        for block in self.blocks:
            x, keys_values = checkpointed(block, remat)(x, segment_ids, keys_values)
        return x[:, count:]

    def init_blocks(self, batch: int, length: int) -> list[HymbaCache]:
        """The blocks' caches behind the meta tokens, before the first of `length` tokens."""
        nothing = jnp.zeros((batch, 0, self.config.width), compute_dtype(self.config))
        none = jnp.zeros(batch, jnp.int32)
        return self.fill(nothing, Prompts(none, none, None), length)[1]

    def fill(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, list[HymbaCache]]:
        """x [B, T, D] -> ([B, T, D], the blocks' caches behind each row's tokens)."""
        count = self.config.meta_tokens
        x = self._behind_meta(x)
        ids = prompts.segment_ids
        prompts = Prompts(
            prompts.lengths + count,
            jnp.where(prompts.first > 0, prompts.first + count, 0),
            None if ids is None else _with_meta(ids, count),
        )
        caches, keys_values = [], None
        for block in self.blocks:
            x, cache, keys_values = block.prefill(x, prompts, count + length, keys_values)
            caches.append(cache)
        return x[:, count:], caches

    def advance(
        self, x: jax.Array, caches: list[Any], positions: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """x [B, D] through the blocks -> ([B, D], the caches behind it)."""
        del positions
        behind, seen = [], None
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache, seen = block.step(x, cache, seen)
            behind.append(cache)
        return x, behind

    def _behind_meta(self, x: jax.Array) -> jax.Array:
        meta = jnp.broadcast_to(self.meta[...], (x.shape[0], *self.meta.shape))
        return jnp.concatenate((meta.astype(x.dtype), x), axis=1)

    def parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """All that costs FLOPs, with the tokens that it gets of a sequence of `length`."""
        for block in self.blocks:
            yield block, self.config.meta_tokens + length
        yield self.head, length


def _with_meta(segment_ids: jax.Array, count: int) -> jax.Array:
    """segment_ids [B, T] -> [B, count + T]; the meta tokens are of the first document."""
    return jnp.pad(segment_ids, ((0, 0), (count, 0)), mode="edge")
