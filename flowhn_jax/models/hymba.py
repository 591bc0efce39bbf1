"""Hymba (arXiv 2411.13676): attention and Mamba heads in parallel on the same tokens of a layer.

Both give E channels, which are normed and averaged with learned scales before one output projection
(equation 4). Learned meta tokens stand before every sequence (section 2.4). Attention has a window
but in the first, middle and last layer, and two layers with windows that follow each other share
keys and values (section 2.3). The state behind the meta tokens passes to the first document of a
packed sequence; attention sees them from all.
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
        self.ssm = mamba1(config, rngs, projects=False)
        norm = dict(epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention_norm, self.ssm_norm = rms_norm(inner, **norm), rms_norm(inner, **norm)
        kwargs = dict(init_std=config.init_std, dtype=dtype, rngs=rngs)
        self.out_proj = linear(inner, config.width, **kwargs)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, keys_values: KeysValues | None
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D] -> ([B, T, D], keys and values: its own, or those given where it borrows)."""
        if not self.attention.borrows:
            keys_values = self.attention.keys_values(x)
        attended = self.attention(x, segment_ids, keys_values)
        return self._fused(attended, self.ssm(x, segment_ids)), keys_values

    def init_cache(self, batch: int, length: int) -> HymbaCache:
        """The cache before the first of `length` tokens."""
        own = None if self.attention.borrows else self.attention.init_cache(batch, length)
        return HymbaCache(own, self.ssm.init_cache(batch, length))

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

    def through_blocks(self, x: jax.Array, segment_ids: jax.Array | None, remat: str) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        count = self.config.meta_tokens
        meta = jnp.broadcast_to(self.meta[...], (x.shape[0], *self.meta.shape))
        x = jnp.concatenate((meta.astype(x.dtype), x), axis=1)
        if segment_ids is not None:
            segment_ids = jnp.pad(segment_ids, ((0, 0), (count, 0)), mode="edge")
        keys_values = None
        for block in self.blocks:
            x, keys_values = checkpointed(block, remat)(x, segment_ids, keys_values)
        return x[:, count:]

    def init_cache(self, batch: int, length: int) -> list[HymbaCache]:
        """The blocks' caches behind the meta tokens, before the first of `length` tokens."""
        cache = super().init_cache(batch, self.config.meta_tokens + length)

        def after(cache: list[HymbaCache], token: jax.Array) -> tuple[list[HymbaCache], None]:
            x = jnp.broadcast_to(token, (batch, *token.shape)).astype(compute_dtype(self.config))
            return self.advance(x, cache)[1], None

        return jax.lax.scan(after, cache, self.meta[...])[0]

    def advance(self, x: jax.Array, cache: list[Any]) -> tuple[jax.Array, list[Any]]:
        """x [B, D] through the blocks -> ([B, D], the cache behind it)."""
        behind, seen = [], None
        for block, of_block in zip(self.blocks, cache, strict=True):
            x, of_block, seen = block.step(x, of_block, seen)
            behind.append(of_block)
        return x, behind

    def parts(self, length: int) -> Iterator[tuple[nnx.Module, int]]:
        """All that costs FLOPs, with the tokens that it gets of a sequence of `length`."""
        for block in self.blocks:
            yield block, self.config.meta_tokens + length
        yield self.head, length
