"""Falcon-H1 (arXiv 2507.22448): attention and Mamba-2 side by side on all tokens, then an MLP."""

from typing import NamedTuple

import jax
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.attention import KVCache
from flowhn_jax.layers.decoder import DecoderLayer, attention, mamba2
from flowhn_jax.layers.mamba2 import Mamba2Cache
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.language_model import LanguageModel


class ParallelCache(NamedTuple):
    """What both halves of a mixer keep."""

    attention: KVCache
    ssm: Mamba2Cache


class ParallelMixer(nnx.Module):
    """attention_out * Attention(attention_in * x) + ssm_out * Mamba2(ssm_in * x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.multipliers = factors = config.multipliers
        of_parts = factors.ssm_z, factors.ssm_x, factors.ssm_b, factors.ssm_c, factors.ssm_dt
        self.ssm = mamba2(config, rngs, norms=False, multipliers=of_parts)
        options = dict(rope_theta=config.rope_theta, key_multiplier=factors.key)
        self.attention = attention(config, rngs, **options)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]."""
        factors = self.multipliers
        ssm = self.ssm(x * factors.ssm_in, segment_ids)
        attended = self.attention(x * factors.attention_in, segment_ids)
        return self._mixed(attended, ssm)

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, ParallelCache]:
        """x [B, T, D] -> ([B, T, D], the cache behind each row's tokens)."""
        factors = self.multipliers
        ssm, of_ssm = self.ssm.prefill(x * factors.ssm_in, prompts, length)
        attended, of_attention = self.attention.prefill(x * factors.attention_in, prompts, length)
        return self._mixed(attended, ssm), ParallelCache(of_attention, of_ssm)

    def init_cache(self, batch: int, length: int) -> ParallelCache:
        """The cache before the first of `length` tokens."""
        of_attention = self.attention.init_cache(batch, length)
        return ParallelCache(of_attention, self.ssm.init_cache(batch, length))

    def step(self, x: jax.Array, cache: ParallelCache) -> tuple[jax.Array, ParallelCache]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache behind it)."""
        factors = self.multipliers
        ssm, of_ssm = self.ssm.step(x * factors.ssm_in, cache.ssm)
        attended, of_attention = self.attention.step(x * factors.attention_in, cache.attention)
        return self._mixed(attended, ssm), ParallelCache(of_attention, of_ssm)

    def _mixed(self, attended: jax.Array, ssm: jax.Array) -> jax.Array:
        factors = self.multipliers
        return attended * factors.attention_out + ssm * factors.ssm_out


class FalconH1(LanguageModel):
    """Parallel mixers, with the multipliers of the config."""

    def block(self, index: int, rngs: nnx.Rngs) -> DecoderLayer:
        """Every layer is alike."""
        del index
        factors = self.config.multipliers
        options = dict(gate_multiplier=factors.mlp_gate, down_multiplier=factors.mlp_down)
        return DecoderLayer(self.config, ParallelMixer(self.config, rngs), rngs, **options)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D]."""
        return self.embed(tokens, scale=self.config.multipliers.embedding)

    def normed(self, x: jax.Array) -> jax.Array:
        """x [..., D] behind the blocks -> what the head takes, its multiplier included."""
        return super().normed(x) * self.config.multipliers.head
