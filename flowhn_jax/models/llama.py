"""Llama (arXiv 2302.13971): attention with rotary positions, SwiGLU."""

import dataclasses
from typing import ClassVar

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.models.base import HeadDimKeys, RotaryKeys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class LlamaConfig(HeadDimKeys, RotaryKeys):
    """What Llama reads: the keys of attention with free head sizes and rotary positions."""

    kind: ClassVar[str] = "llama"


@register(LlamaConfig)
class Llama(LanguageModel):
    """A stack of attention layers."""

    config: LlamaConfig

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[KVCache]:
        """Return a layer; all are alike."""
        del index
        config = self.config
        mixer = Attention(config.attention_sizes, context, rope_theta=config.rope_theta)
        return DecoderLayer(mixer, config.width, config.mlp_width, context)
