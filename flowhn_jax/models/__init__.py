"""Models by config: built, initialised and run as pure functions of their parameters."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.config import ModelConfig
from flowhn_jax.layers.decoder import compute_dtype
from flowhn_jax.layers.prompts import make_prompts
from flowhn_jax.models.arguments import checks_tokens
from flowhn_jax.models.falcon_h1 import FalconH1
from flowhn_jax.models.flowhn import FlowHN
from flowhn_jax.models.hymba import Hymba
from flowhn_jax.models.jamba import SHM, Jamba
from flowhn_jax.models.language_model import DecodeCache, LanguageModel
from flowhn_jax.models.llama import Llama
from flowhn_jax.models.mamba import Mamba

__all__ = [
    "DecodeCache",
    "Params",
    "abstract_model",
    "abstract_params",
    "bind",
    "build",
    "can_decode",
    "compute_dtype",
    "for_inference",
    "forward",
    "init",
    "init_cache",
    "is_matrix",
    "param_count",
    "prefill",
    "step",
]

_MODELS: dict[str, type[LanguageModel]] = {
    "flowhn": FlowHN,
    "llama": Llama,
    "mamba1": Mamba,
    "mamba2": Mamba,
    "jamba": Jamba,
    "shm": SHM,
    "hymba": Hymba,
    "falcon_h1": FalconH1,
}

Params = dict[str, Any]  # nested dict of float32 arrays


def build(config: ModelConfig, rngs: nnx.Rngs | None = None) -> LanguageModel:
    """The model that `config` describes; random parameters from `rngs` (default: key 0)."""
    return _MODELS[config.kind](config, nnx.Rngs(0) if rngs is None else rngs)


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    # The dtype 'auto' depends on what is compiled for, which may change within a process.
    return _abstract_of(dataclasses.replace(config, dtype=str(compute_dtype(config))))


@functools.lru_cache(maxsize=32)
def _abstract_of(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: build(config)), nnx.Param)


def abstract_model(config: ModelConfig) -> LanguageModel:
    """The model with jax.ShapeDtypeStruct for its parameters."""
    return nnx.merge(*_abstract(config))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, as jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(config)[1])


def param_count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig, params: Params) -> LanguageModel:
    """The model holding `params`; cheap, made anew wherever a traced function needs it."""
    return nnx.merge(_abstract(config)[0], nnx.State(params))


@checks_tokens("B T")
@functools.partial(jax.jit, static_argnums=0)
def forward(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Return logits [B, T, V] in float32.

    Args:
      config: of any model.
      params: as of `init`.
      tokens: [B, T] int32, in 0..V-1. While a caller is traced their values cannot be checked: an
        id outside makes the logits from its position on NaN.
      segment_ids: [B, T] int32, documents of packed sequences; None: one document a row.

    Raises:
      ValueError: tokens are not integers [B, T], are empty, or are outside 0..V-1.
    """
    model = bind(config, params)
    return _logits(model, model(tokens, segment_ids))


@checks_tokens("B T")
@functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "padding"))
def prefill(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    length: int | None = None,
    padding: str = "right",
) -> tuple[jax.Array, DecodeCache]:
    """Reads prompts in one pass.

    Each row's tokens are routed by their own positions, counted from its first token.

    Args:
      config: of a model for which `can_decode` holds.
      params: as of `init`.
      tokens: [B, T] int32, in 0..V-1, as of `forward`.
      lengths: [B] int32, tokens of each prompt, 1 to T; the rest is padding. None: T.
      segment_ids: [B, T] int32, documents, of which each row's last one goes on. None: one.
      length: tokens, the prompt's and those behind it, that the cache has room for; None: T.
      padding: 'right' or 'left', where in the rows it is.

    Returns:
      (logits [B, V] float32 of the token after each prompt, the cache for `step`).

    Raises:
      ValueError: tokens are not as above, `lengths` outside 1..T, `padding` is neither, T is above
        `length`, or `length` above the context of a split that is tied to it.
    """
    batch, columns = tokens.shape
    length = columns if length is None else length
    if columns > length:
        raise ValueError(f"The prompts have {columns} tokens; accepted is 1 to length = {length}.")
    if padding not in ("left", "right"):
        raise ValueError(f"padding is {padding!r}; accepted are left, right.")
    lengths = jnp.full(batch, columns) if lengths is None else lengths
    if padding == "left":
        order = (jnp.arange(columns) + columns - lengths[:, None]) % columns
        tokens = jnp.take_along_axis(tokens, order, axis=1)
        if segment_ids is not None:
            segment_ids = jnp.take_along_axis(segment_ids, order, axis=1)
    model = bind(config, params)
    hidden, cache = model.prefill(tokens, make_prompts(lengths, segment_ids), length)
    return _logits(model, hidden), cache


def _logits(model: LanguageModel, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> [..., V] float32."""
    kernel = model.head.kernel[...].astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at a path of JAX's is a kernel or the embedding."""
    return path[-1].key in ("kernel", "embedding")


def for_inference(config: ModelConfig, params: Params) -> Params:
    """The parameters with those of matrix products in the compute dtype, once and for all.

    That is how products take them anyway; a decode step then reads half of the bytes.
    """
    dtype = compute_dtype(config)

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if is_matrix(path) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def can_decode(config: ModelConfig) -> bool:
    """Whether the model has caches: not one whose split is planned anew for each length."""
    return config.kind != "flowhn" or config.split.scope == "context"


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def init_cache(config: ModelConfig, params: Params, batch: int, length: int) -> DecodeCache:
    """What `step` keeps of `batch` sequences of at most `length` tokens, before the first one."""
    return bind(config, params).init_cache(batch, length)


@checks_tokens("B")
@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """One more token of each sequence, at its own position.

    Args:
      config: of a model for which `can_decode` holds.
      params: as of `init`.
      tokens: [B] int32, in 0..V-1, as of `forward`. Where they are on a device and no caller is
        traced, the check waits for them: a loop of many steps is faster inside `jax.jit`.
      cache: of `prefill`, `init_cache` or the step before; it is used up. What it has no room for
        is lost without a word.

    Returns:
      (logits [B, V] float32 of the token after it, the cache behind it).

    Raises:
      ValueError: tokens are not integers [B], are empty, or are outside 0..V-1.
    """
    model = bind(config, params)
    hidden, cache = model.step(tokens, cache)
    return _logits(model, hidden), cache
