"""Llama (arXiv 2302.13971) and its relatives: attention with rotary positions, SwiGLU."""

import dataclasses
from typing import ClassVar

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mlp import MLPOptions
from flowhn_jax.models.base import HeadDimKeys, ScaledRotaryKeys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.published_keys import AttentionBiasKeys
from flowhn_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class LlamaConfig(HeadDimKeys, ScaledRotaryKeys, AttentionBiasKeys):
    """What Llama reads: the keys of attention with free head sizes and rotary positions.

    Attributes:
      qk_norm: whether each head's queries and keys have an RMS norm, as in Qwen3.
    """

    kind: ClassVar[str] = "llama"

    qk_norm: bool = False


@register(LlamaConfig)
class Llama(LanguageModel):
    """A stack of attention layers."""

    config: LlamaConfig

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[KVCache]:
        """Return a layer; all are alike."""
        del index
        config = self.config
        mixer = Attention(
            config.attention_sizes,
            context,
            rope_theta=config.rope_theta,
            rope_scaling=config.rope_scaling,
            qk_norm=config.qk_norm,
            bias=config.attention_bias,
        )
        options = MLPOptions(bias=config.mlp_bias)
        return DecoderLayer(mixer, config.width, config.mlp_width, context, options)
