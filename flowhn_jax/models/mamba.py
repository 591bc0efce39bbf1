"""Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): mixers alone, without MLPs."""

import dataclasses
from typing import ClassVar

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Cache
from flowhn_jax.models.base import Mamba1Keys, Mamba2Keys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.registry import register


@dataclasses.dataclass(frozen=True)
class Mamba1Config(Mamba1Keys):
    """What Mamba-1 reads: the keys of its mixer."""

    kind: ClassVar[str] = "mamba1"


@dataclasses.dataclass(frozen=True)
class Mamba2Config(Mamba2Keys):
    """What Mamba-2 reads: the keys of its mixer."""

    kind: ClassVar[str] = "mamba2"


@register(Mamba1Config)
class Mamba1Model(LanguageModel):
    """A stack of Mamba-1 mixers."""

    config: Mamba1Config

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Mamba1Cache]:
        """Return a layer; all are alike. The norms on dt, B and C are Jamba's, not Mamba's."""
        del index
        mixer = Mamba1(self.config.mamba1_sizes, context, norms=False)
        return DecoderLayer(mixer, self.config.width, 0, context)


@register(Mamba2Config)
class Mamba2Model(LanguageModel):
    """A stack of Mamba-2 mixers."""

    config: Mamba2Config

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Mamba2Cache]:
        """Return a layer; all are alike."""
        del index
        mixer = Mamba2(self.config.mamba2_sizes, context)
        return DecoderLayer(mixer, self.config.width, 0, context)
