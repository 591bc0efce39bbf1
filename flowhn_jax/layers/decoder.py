"""The decoder layer of all models but Hymba: a mixer, then an MLP, each with a residual."""

from typing import Generic

import jax
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import rms_norm
from flowhn_jax.layers.mixer import CacheT, Mixer
from flowhn_jax.layers.mlp import PLAIN_MLP, MLPOptions, SwiGLU
from flowhn_jax.layers.prompts import Prompts
from kernels.partition import constrain

LAYOUT = "B L D"


class DecoderLayer(nnx.Module, Generic[CacheT]):
    """x + mixer(RMS(x)), then x + SwiGLU(RMS(x)) unless `mlp_width` is 0."""

    def __init__(
        self,
        mixer: Mixer[CacheT],
        width: int,
        mlp_width: int,
        context: LayerContext,
        mlp_options: MLPOptions = PLAIN_MLP,
    ):
        self.norm = rms_norm(width, context)
        self.mixer = mixer
        self.has_mlp = mlp_width > 0
        if self.has_mlp:
            self.mlp_norm = rms_norm(width, context)
            self.mlp = SwiGLU(width, mlp_width, context, mlp_options)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array | None, **options: jax.Array
    ) -> jax.Array:
        """Return the stream [B, T, D] after the layer, for x [B, T, D], segment_ids [B, T].

        The options are further arguments of the mixer, here and in the other methods.
        """
        x = constrain(x, LAYOUT)
        mixed = self.mixer(self.norm(x), segment_ids, **options)
        return constrain(self.add_mlp(x + mixed), LAYOUT)

    def add_mlp(self, x: jax.Array) -> jax.Array:
        """Return the stream [..., D] after the MLP and its residual; x itself without an MLP."""
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x

    def init_cache(self, batch: int, length: int) -> CacheT:
        """Return the mixer's cache of sequences without tokens, with room for `length` each."""
        return self.mixer.init_cache(batch, length)

    def prefill(
        self, x: jax.Array, prompts: Prompts, length: int, **options: jax.Array
    ) -> tuple[jax.Array, CacheT]:
        """Return the stream [B, T, D], and the mixer's cache with room for `length` tokens."""
        x = constrain(x, LAYOUT)
        mixed, cache = self.mixer.prefill(self.norm(x), prompts, length, **options)
        return constrain(self.add_mlp(x + mixed), LAYOUT), cache

    def step(
        self,
        x: jax.Array,
        cache: CacheT,
        active: jax.Array | None = None,
        **options: jax.Array,
    ) -> tuple[jax.Array, CacheT]:
        """Return the stream [B, D] of one token per sequence, and the resulting cache.

        A sequence that is not `active` [B] keeps its cache; its output is undefined.
        """
        mixed, new_cache = self.mixer.step(self.norm(x), cache, active, **options)
        return self.add_mlp(x + mixed), new_cache
