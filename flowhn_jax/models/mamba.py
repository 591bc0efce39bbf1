"""Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): mixers alone, without MLPs."""

import dataclasses
from typing import ClassVar

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.layers.mamba1 import Mamba1, Mamba1Cache
from flowhn_jax.layers.mamba2 import Mamba2, Mamba2Cache
from flowhn_jax.models.base import Mamba1Keys
from flowhn_jax.models.language_model import LanguageModel
from flowhn_jax.models.published_keys import SSMBiasKeys, TimeStepLimitKeys
from flowhn_jax.models.registry import register
from flowhn_jax.utils.checks import require


@dataclasses.dataclass(frozen=True)
class Mamba1Config(Mamba1Keys, SSMBiasKeys):
    """What Mamba-1 reads: the keys of its mixer, and Falcon Mamba's norms (arXiv 2410.05355).

    Attributes:
      ssm_norm_eps: added to the mean square in RMS norms without scales on dt, B and C, as in
        Falcon Mamba; None: no such norms, as in Mamba.
    """

    kind: ClassVar[str] = "mamba1"

    ssm_norm_eps: float | None = None

    def __post_init__(self):
        super().__post_init__()
        epsilon = self.ssm_norm_eps
        require(epsilon is None or epsilon > 0, "model.ssm_norm_eps", "above 0, or None", epsilon)


@dataclasses.dataclass(frozen=True)
class Mamba2Config(TimeStepLimitKeys, SSMBiasKeys):
    """What Mamba-2 reads: the keys of its mixer."""

    kind: ClassVar[str] = "mamba2"


@register(Mamba1Config)
class Mamba1Model(LanguageModel):
    """A stack of Mamba-1 mixers."""

    config: Mamba1Config

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Mamba1Cache]:
        """Return a layer; all are alike. Norms with scales on dt, B and C are Jamba's alone."""
        del index
        config = self.config
        mixer = Mamba1(
            config.mamba1_sizes,
            context,
            norms=False,
            unscaled_norm_epsilon=config.ssm_norm_eps,
            biases=config.ssm_biases,
        )
        return DecoderLayer(mixer, config.width, 0, context)


@register(Mamba2Config)
class Mamba2Model(LanguageModel):
    """A stack of Mamba-2 mixers."""

    config: Mamba2Config

    def make_block(self, index: int, context: LayerContext) -> DecoderLayer[Mamba2Cache]:
        """Return a layer; all are alike."""
        del index
        config = self.config
        mixer = Mamba2(
            config.mamba2_sizes,
            context,
            biases=config.ssm_biases,
            dt_limits=config.ssm_dt_limits,
        )
        return DecoderLayer(mixer, config.width, 0, context)
