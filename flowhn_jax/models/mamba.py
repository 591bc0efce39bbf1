"""Mamba-1 (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): mixers alone, without MLPs."""

from flax import nnx

from flowhn_jax.layers.decoder import DecoderLayer, mamba1, mamba2
from flowhn_jax.models.language_model import LanguageModel


class Mamba(LanguageModel):
    """Layers of one mixer, as the config's kind says."""

    def block(self, index: int, rngs: nnx.Rngs) -> DecoderLayer:
        """Every layer is alike; the norms on dt, B and C are Jamba's, not Mamba's."""
        del index
        if self.config.is_mamba2:
            mixer = mamba2(self.config, rngs)
        else:
            mixer = mamba1(self.config, rngs, norms=False)
        return DecoderLayer(self.config, mixer, rngs, has_mlp=False)
