"""Llama (arXiv 2302.13971) and its relatives: attention with rotary positions, SwiGLU."""

import dataclasses
from typing import ClassVar

from flowhn_jax.layers.attention import Attention, KVCache
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.models.base import HeadDimKeys, ScaledRotaryKeys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.registry import register
from flowhn_jax.utils.checks import require

ATTENTION_BIASES = ("none", "qkv", "all")


@dataclasses.dataclass(frozen=True)
class LlamaConfig(HeadDimKeys, ScaledRotaryKeys):
    """What Llama reads: the keys of attention with free head sizes and rotary positions.

    Attributes:
      attention_bias: which products of attention have a bias: 'none', 'qkv' (queries, keys and
        values, as in Qwen2), or 'all' (the output as well).
      qk_norm: whether each head's queries and keys have an RMS norm, as in Qwen3.
      mlp_bias: whether the products of the MLPs have a bias.
    """

    kind: ClassVar[str] = "llama"

    attention_bias: str = "none"
    qk_norm: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        allowed = f"one of {', '.join(ATTENTION_BIASES)}"
        bias = self.attention_bias
        require(bias in ATTENTION_BIASES, "model.attention_bias", allowed, bias)


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
        return DecoderLayer(
            mixer, config.width, config.mlp_width, context, mlp_bias=config.mlp_bias
        )
