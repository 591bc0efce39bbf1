"""Sequential hybrids of attention and Mamba-1 layers: Jamba (arXiv 2403.19887) and SHM.

SHM is the sequential hybrid that FlowHN's paper (arXiv 2505.19472) compares with: Jamba's layers,
Mamba-1 and attention in turns. All MLPs are dense, and attention has no positions.
"""

from flax import nnx

from flowhn_jax.layers.decoder import DecoderLayer, attention, mamba1
from flowhn_jax.models.language_model import LanguageModel


class Jamba(LanguageModel):
    """One layer in `attention_period` attends, the others are Mamba-1."""

    def block(self, index: int, rngs: nnx.Rngs) -> DecoderLayer:
        """Layer `index`, by its place in the period."""
        period, offset = self.config.attention_period, self.config.attention_offset
        make = attention if index % period == offset else mamba1
        return DecoderLayer(self.config, make(self.config, rngs), rngs)


class SHM(LanguageModel):
    """Mamba-1 in even layers, attention in odd ones."""

    def block(self, index: int, rngs: nnx.Rngs) -> DecoderLayer:
        """Layer `index`, by its parity."""
        make = attention if index % 2 else mamba1
        return DecoderLayer(self.config, make(self.config, rngs), rngs)
