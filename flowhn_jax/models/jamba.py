"""Sequential hybrids of attention and Mamba-1 layers: Jamba (arXiv 2403.19887) and SHM.

SHM is the sequential hybrid that FlowHN's paper (arXiv 2505.19472) compares with: Jamba's layers,
Mamba-1 and attention alternating. All MLPs are dense, and attention has no positions.
"""

import dataclasses
from typing import Any, ClassVar

from flowhn_jax.layers.attention import Attention
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mamba1 import Mamba1
from flowhn_jax.layers.ssm_biases import USUAL, SSMBiases
from flowhn_jax.models.base import HeadDimKeys, Mamba1Keys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.published_keys import SSMBiasKeys
from flowhn_jax.models.registry import register
from flowhn_jax.utils.checks import require, require_positive


@dataclasses.dataclass(frozen=True)
class SHMConfig(Mamba1Keys, HeadDimKeys):
    """What SHM reads: the keys of attention with free head sizes and of Mamba-1."""

    kind: ClassVar[str] = "shm"


@dataclasses.dataclass(frozen=True)
class JambaConfig(Mamba1Keys, SSMBiasKeys, HeadDimKeys):
    """What Jamba reads: SHM's keys, the mixers' biases, and which layers attend.

    Attributes:
      attention_period: one of this many layers attends, the others are Mamba-1.
      attention_offset: index within the period of the layer that attends.
    """

    kind: ClassVar[str] = "jamba"

    attention_period: int = 8
    attention_offset: int = 4

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "model", "attention_period")
        period, offset = self.attention_period, self.attention_offset
        in_period = f"0 to model.attention_period - 1 = {period - 1}"
        require(0 <= offset < period, "model.attention_offset", in_period, offset)

    def attends(self, index: int) -> bool:
        """Return whether layer `index` is attention."""
        return index % self.attention_period == self.attention_offset


def _make_layer(
    config: SHMConfig | JambaConfig,
    attends: bool,
    context: LayerContext,
    biases: SSMBiases = USUAL,
) -> DecoderLayer[Any]:
    if attends:
        mixer = Attention(config.attention_sizes, context)
    else:
        mixer = Mamba1(config.mamba1_sizes, context, biases=biases)
    return DecoderLayer(mixer, config.width, config.mlp_width, context)


@register(JambaConfig)
class Jamba(LanguageModel):
    """A stack in which one layer of `attention_period` attends and the others are Mamba-1."""

    config: JambaConfig

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Any]:
        """Return layer `index`, by its place in the period."""
        config = self.config
        return _make_layer(config, config.attends(index), context, config.ssm_biases)


@register(SHMConfig)
class SHM(LanguageModel):
    """A stack of Mamba-1 in even layers and attention in odd ones."""

    config: SHMConfig

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Any]:
        """Return layer `index`, by its parity."""
        return _make_layer(self.config, index % 2 == 1, context)
