"""Falcon-H1 (arXiv 2507.22448): attention and Mamba-2 in parallel on all tokens, then an MLP."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
from flax import nnx

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mamba2 import GATED_NORMS, Mamba2, Mamba2Cache, Mamba2Multipliers
from flowhn_jax.layers.mlp import MLPOptions
from flowhn_jax.layers.prompts import Prompts
from flowhn_jax.models.base import HeadDimKeys, ScaledRotaryKeys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.published_keys import AttentionBiasKeys, SSMBiasKeys, TimeStepLimitKeys
from flowhn_jax.models.registry import register
from flowhn_jax.utils.checks import require


@dataclasses.dataclass(frozen=True)
class Multipliers:
    """Factors on the activations of Falcon-H1 (arXiv 2507.22448, section 3.2.3).

    Attributes:
      embedding: factor on the embedded tokens.
      head: factor on what the head takes.
      attention_in: factor on what attention takes.
      attention_out: factor on what attention returns.
      key: factor on attention's keys.
      ssm_in: factor on what the Mamba-2 mixer takes.
      ssm_out: factor on what the Mamba-2 mixer returns.
      ssm_z: factor on the gates z that the mixer's in_proj makes.
      ssm_x: factor on the channels x that the mixer's in_proj makes.
      ssm_b: factor on B that the mixer's in_proj makes.
      ssm_c: factor on C that the mixer's in_proj makes.
      ssm_dt: factor on the time steps dt that the mixer's in_proj makes.
      mlp_gate: factor on the MLP's gate, before its silu.
      mlp_down: factor on what the MLP returns.
    """

    embedding: float = 1.0
    head: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm_z: float = 1.0
    ssm_x: float = 1.0
    ssm_b: float = 1.0
    ssm_c: float = 1.0
    ssm_dt: float = 1.0
    mlp_gate: float = 1.0
    mlp_down: float = 1.0


@dataclasses.dataclass(frozen=True)
class FalconH1Config(
    TimeStepLimitKeys, SSMBiasKeys, HeadDimKeys, ScaledRotaryKeys, AttentionBiasKeys
):
    """What Falcon-H1 reads: the keys of rotary attention and of Mamba-2, and its own.

    Attributes:
      multipliers: factors on activations.
      ssm_gated_norm: RMS norm of the Mamba-2 mixer's outputs, 'before_gate' or 'after_gate', or
        'none', as in the 0.5B.
    """

    kind: ClassVar[str] = "falcon_h1"

    multipliers: Multipliers = dataclasses.field(default_factory=Multipliers)
    ssm_gated_norm: str = "none"

    def __post_init__(self):
        super().__post_init__()
        found = self.ssm_gated_norm
        require(
            found in GATED_NORMS, "model.ssm_gated_norm", f"one of {', '.join(GATED_NORMS)}", found
        )


class ParallelCache(NamedTuple):
    """The caches of both halves of a mixer."""

    attention: KVCache
    ssm: Mamba2Cache


class ParallelMixer(nnx.Module):
    """attention_out * Attention(attention_in * x) + ssm_out * Mamba2(ssm_in * x)."""

    def __init__(self, config: FalconH1Config, context: LayerContext):
        self.multipliers = factors = config.multipliers
        of_parts = factors.ssm_z, factors.ssm_x, factors.ssm_b, factors.ssm_c, factors.ssm_dt
        self.ssm = Mamba2(
            config.mamba2_sizes,
            context,
            gated_norm=config.ssm_gated_norm,
            multipliers=Mamba2Multipliers(*of_parts),
            biases=config.ssm_biases,
            dt_limits=config.ssm_dt_limits,
        )
        self.attention = Attention(
            config.attention_sizes,
            context,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            key_multiplier=factors.key,
            bias=config.attention_bias,
        )

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Return the mixed tokens [B, T, D]."""
        factors = self.multipliers
        ssm = self.ssm(x * factors.ssm_in, segment_ids)
        return self._add(self.attention(x * factors.attention_in, segment_ids), ssm)

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int
    ) -> tuple[jax.Array, ParallelCache]:
        """Return the mixed tokens [B, T, D], and the cache after each row's tokens."""
        factors = self.multipliers
        ssm, of_ssm = self.ssm.prefill(x * factors.ssm_in, prompts, length)
        attended, of_attention = self.attention.prefill(x * factors.attention_in, prompts, length)
        return self._add(attended, ssm), ParallelCache(of_attention, of_ssm)

    def init_cache(self, batch: int, length: int) -> ParallelCache:
        """Return the cache before the first of `length` tokens."""
        of_attention = self.attention.init_cache(batch, length)
        return ParallelCache(of_attention, self.ssm.init_cache(batch, length))

    def step(
        self, x: jax.Array, cache: ParallelCache, active: jax.Array | None = None
    ) -> tuple[jax.Array, ParallelCache]:
        """Return the mixed token of each sequence [B, D], and the resulting cache."""
        factors = self.multipliers
        ssm, of_ssm = self.ssm.step(x * factors.ssm_in, cache.ssm, active)
        attended, of_attention = self.attention.step(
            x * factors.attention_in, cache.attention, active
        )
        return self._add(attended, ssm), ParallelCache(of_attention, of_ssm)

    def mixing_flops(self, tokens: int, *, causal: bool) -> int:
        """Return the FLOPs of both halves without their linear layers."""
        halves = self.attention, self.ssm
        return sum(half.mixing_flops(tokens, causal=causal) for half in halves)

    def _add(self, attended: jax.Array, ssm: jax.Array) -> jax.Array:
        factors = self.multipliers
        return attended * factors.attention_out + ssm * factors.ssm_out


@register(FalconH1Config)
class FalconH1(LanguageModel):
    """A stack of parallel mixers, with the multipliers of the config."""

    config: FalconH1Config

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[ParallelCache]:
        """Return a layer; all are alike."""
        del index
        config = self.config
        mixer, factors = ParallelMixer(config, context), config.multipliers
        options = MLPOptions(factors.mlp_gate, factors.mlp_down, config.mlp_bias)
        return DecoderLayer(mixer, config.width, config.mlp_width, context, options)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Return the embedded tokens [..., D], times their multiplier."""
        return self.embed(tokens, scale=self.config.multipliers.embedding)

    def normalize(self, x: jax.Array) -> jax.Array:
        """Return what the head takes [..., D], times its multiplier."""
        return super().normalize(x) * self.config.multipliers.head
