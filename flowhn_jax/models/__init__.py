"""Models by config: built, initialised and run as pure functions of their parameters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.models.flowhn import FlowHN, compute_dtype

__all__ = [
    "Params",
    "abstract_params",
    "bind",
    "build",
    "compute_dtype",
    "forward",
    "init",
    "param_count",
]

Params = dict[str, Any]  # nested dict of float32 arrays


def build(config: ModelConfig, rngs: nnx.Rngs | None = None) -> nnx.Module:
    """The model that `config` describes; random parameters from `rngs` (default: key 0)."""
    return FlowHN(config, nnx.Rngs(0) if rngs is None else rngs)


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    # The dtype 'auto' depends on what is compiled for, which may change within a process.
    return _abstract_of(dataclasses.replace(config, dtype=str(compute_dtype(config))))


@functools.lru_cache(maxsize=32)
def _abstract_of(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: build(config)), nnx.Param)


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, as jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(config)[1])


def param_count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig, params: Params) -> nnx.Module:
    """The model holding `params`; cheap, made anew wherever a traced function needs it."""
    return nnx.merge(_abstract(config)[0], nnx.State(params))


@functools.partial(jax.jit, static_argnums=0)
def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, T, V] float32 of tokens [B, T] int32, documents marked by segment_ids [B, T]."""
    model = bind(config, params)
    hidden = model(tokens, segment_ids)
    kernel = model.head.kernel[...].astype(hidden.dtype)
    return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)
