"""Llama (arXiv 2302.13971): attention with rotary positions, SwiGLU."""

from flax import nnx

from flowhn_jax.layers.decoder import DecoderLayer, attention
from flowhn_jax.models.language_model import LanguageModel


class Llama(LanguageModel):
    """Attention layers alone."""

    def block(self, index: int, rngs: nnx.Rngs) -> DecoderLayer:
        """Every layer is alike."""
        del index
        mixer = attention(self.config, rngs, rope_theta=self.config.rope_theta)
        return DecoderLayer(self.config, mixer, rngs)
