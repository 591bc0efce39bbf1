"""A decoder layer, and the mixers in it, from a model's config."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.attention import Attention
from flowhn_jax.layers.linear import rms_norm
from flowhn_jax.layers.mamba1 import Mamba1
from flowhn_jax.layers.mamba2 import Mamba2
from flowhn_jax.layers.mlp import SwiGLU
from flowhn_jax.layers.prompts import Prompts
from kernels.backends import target_platform
from kernels.partition import constrain

_LAYOUT = "B L D"


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Dtype of matrix products: `model.dtype`, where 'auto' is float32 on a CPU else bfloat16."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)


def _kwargs(config: ModelConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    return dict(init_std=config.init_std, dtype=compute_dtype(config), rngs=rngs)


def attention(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> Attention:
    """Attention of the config's sizes; `options` as of `Attention`."""
    dims = config.dims
    sizes = dims.width, dims.heads, dims.kv_heads, dims.head_dim
    return Attention(*sizes, **_kwargs(config, rngs), **options)


def mamba1(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> Mamba1:
    """A Mamba-1 mixer of the config's sizes; `options` as of `Mamba1`."""
    dims = config.dims
    sizes = dims.width, dims.inner, dims.state, dims.conv, dims.dt_rank
    return Mamba1(*sizes, norm_eps=config.norm_eps, **_kwargs(config, rngs), **options)


def mamba2(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> Mamba2:
    """A Mamba-2 mixer of the config's sizes; `options` as of `Mamba2`."""
    dims = config.dims
    sizes = dims.width, dims.inner, dims.state, dims.conv, config.ssm_head_dim, config.ssm_groups
    return Mamba2(*sizes, norm_eps=config.norm_eps, **_kwargs(config, rngs), **options)


class DecoderLayer(nnx.Module):
    """x + mixer(RMS(x)), then x + SwiGLU(RMS(x)) where `has_mlp`; `options` as of `SwiGLU`."""

    def __init__(
        self,
        config: ModelConfig,
        mixer: nnx.Module,
        rngs: nnx.Rngs,
        *,
        has_mlp: bool = True,
        **options: Any,
    ):
        norm = dict(epsilon=config.norm_eps, dtype=compute_dtype(config), rngs=rngs)
        self.norm = rms_norm(config.width, **norm)
        self.mixer = mixer
        self.has_mlp = has_mlp
        if has_mlp:
            self.mlp_norm = rms_norm(config.width, **norm)
            sizes = config.width, config.mlp_width
            self.mlp = SwiGLU(*sizes, **_kwargs(config, rngs), **options)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]."""
        x = constrain(x, _LAYOUT)
        return constrain(self.feed(x + self.mixer(self.norm(x), segment_ids)), _LAYOUT)

    def feed(self, x: jax.Array) -> jax.Array:
        """The second half of the layer: x [..., D] -> [..., D]."""
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x

    def init_cache(self, batch: int, length: int) -> Any:
        """The mixer's cache before the first of `length` tokens."""
        return self.mixer.init_cache(batch, length)

    def prefill(self, x: jax.Array, prompts: Prompts, length: int) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> ([B, T, D], the mixer's cache behind each row, for `length` tokens)."""
        x = constrain(x, _LAYOUT)
        mixed, cache = self.mixer.prefill(self.norm(x), prompts, length)
        return constrain(self.feed(x + mixed), _LAYOUT), cache

    def step(
        self, x: jax.Array, cache: Any, active: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """One token of each sequence: x [B, D] -> ([B, D], the cache behind it).

        A sequence that is not `active` [B] keeps its cache; its output means nothing.
        """
        options = {} if active is None else {"active": active}
        mixed, cache = self.mixer.step(self.norm(x), cache, **options)
        return self.feed(x + mixed), cache
