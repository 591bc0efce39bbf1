"""Models by config: built, initialised and run as pure functions of their parameters.

Importing this package registers all model families (`models.registry`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Families are registered in the order of these imports, which is that of tables and messages.
# isort: off
from flowhn_jax.models import flowhn, llama, mamba, jamba, hymba, falcon_h1

# isort: on
from flowhn_jax.layers.prompts import make_prompts
from flowhn_jax.models import registry
from flowhn_jax.models.arguments import checks_tokens
from flowhn_jax.models.base import ModelConfig
from flowhn_jax.models.language_model import DecodeCache, LanguageModel

__all__ = [
    "DecodeCache",
    "ModelConfig",
    "Params",
    "abstract_model",
    "abstract_params",
    "bind",
    "build",
    "can_decode",
    "compute_dtype",
    "falcon_h1",
    "flowhn",
    "for_inference",
    "forward",
    "hymba",
    "init",
    "init_cache",
    "is_hidden_matrix",
    "is_matrix",
    "jamba",
    "llama",
    "mamba",
    "param_count",
    "prefill",
    "step",
]

Params = dict[str, Any]  # nested dict of float32 arrays


def build(config: ModelConfig, rngs: nnx.Rngs | None = None) -> LanguageModel:
    """Return the model that `config` describes, with random parameters.

    Args:
      config: a config of any family.
      rngs: keys of the parameters; None: those of key 0.
    """
    return registry.model_class(config.kind)(config, nnx.Rngs(0) if rngs is None else rngs)


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the dtype of matrix products on the platform that is compiled for."""
    return config.compute_dtype


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    # The dtype 'auto' depends on what is compiled for, which may change within a process.
    return _abstract_of(dataclasses.replace(config, dtype=str(compute_dtype(config))))


@functools.lru_cache(maxsize=32)
def _abstract_of(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: build(config)), nnx.Param)


def abstract_model(config: ModelConfig) -> LanguageModel:
    """Return the model with jax.ShapeDtypeStruct for its parameters."""
    return nnx.merge(*_abstract(config))


def abstract_params(config: ModelConfig) -> Params:
    """Return shapes and dtypes of the parameters, as jax.ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(config)[1])


def param_count(config: ModelConfig) -> int:
    """Return the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Return random parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(build(config, nnx.Rngs(key)), nnx.Param))


def bind(config: ModelConfig, params: Params) -> LanguageModel:
    """Return the model with `params`; cheap, so every traced function makes its own."""
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
      config: a config of any family.
      params: from `init`.
      tokens: [B, T] int32, in 0..V-1. Inside a traced function the values cannot be checked: an id
        outside makes the logits from its position on NaN.
      segment_ids: [B, T] int32, documents of packed sequences; None: one document per row.

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
    """Return the logits after each prompt, and the cache to continue it from.

    Each row's tokens are routed by their own positions, counted from the row's first real token.

    Args:
      config: the config of a model for which `can_decode` holds.
      params: from `init`.
      tokens: [B, T] int32, in 0..V-1, as for `forward`.
      lengths: [B] int32, tokens of each prompt, 1 to T; the rest is padding. None: T.
      segment_ids: [B, T] int32, documents, of which each row's last one is continued. None: one.
      length: tokens that the cache has room for, those of the prompt included; None: T.
      padding: the side of a row that its padding is on, 'right' or 'left'.

    Returns:
      (logits [B, V] float32 of the token after each prompt, the cache for `step`).

    Raises:
      ValueError: tokens are not integers [B, T] in 0..V-1, `lengths` are outside 1..T, `padding` is
        neither 'left' nor 'right', T is above `length`, or `length` is above the model's
        `max_length`.
    """
    batch, columns = tokens.shape
    length = columns if length is None else length
    if columns > length:
        raise ValueError(
            f"models.prefill: length must be at least the prompts' {columns} tokens; got {length}."
        )
    if padding not in ("left", "right"):
        raise ValueError(f"models.prefill: padding must be 'left' or 'right'; got {padding!r}.")
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
    """Return logits [..., V] in float32 of hidden [..., D]."""
    kernel = model.head_kernel().astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


def is_matrix(path: tuple[Any, ...]) -> bool:
    """Return whether the parameter at a path of jax.tree_util is a kernel or the embedding."""
    return path[-1].key in ("kernel", "embedding")


def is_hidden_matrix(path: tuple[Any, ...]) -> bool:
    """Return whether the parameter at a path is a kernel between the embedding and the head."""
    return is_matrix(path) and path[0].key not in ("embed", "head")


def for_inference(config: ModelConfig, params: Params) -> Params:
    """Return the parameters with those of matrix products cast to the compute dtype.

    The products cast them anyway; cast once, a decode step reads half of the bytes.
    """
    dtype = compute_dtype(config)

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if is_matrix(path) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def can_decode(config: ModelConfig) -> bool:
    """Return whether the model has caches: not where its split depends on the length."""
    return config.can_decode


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def init_cache(config: ModelConfig, params: Params, batch: int, length: int) -> DecodeCache:
    """Return the cache of `batch` sequences before the first of at most `length` tokens."""
    return bind(config, params).init_cache(batch, length)


@checks_tokens("B")
@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
    config: ModelConfig, params: Params, tokens: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, DecodeCache]:
    """Return the logits after one more token of each sequence, and the resulting cache.

    Args:
      config: the config of a model for which `can_decode` holds.
      params: from `init`.
      tokens: [B] int32, in 0..V-1, as for `forward`. Outside of traced functions the check waits
        for tokens on a device: a loop of many steps is faster inside `jax.jit`.
      cache: from `prefill`, `init_cache` or the step before; it is donated. Tokens for which it has
        no room are silently dropped from it.

    Returns:
      (logits [B, V] float32 of the next token, the resulting cache).

    Raises:
      ValueError: tokens are not integers [B], are empty, or are outside 0..V-1.
    """
    model = bind(config, params)
    hidden, cache = model.step(tokens, cache)
    return _logits(model, hidden), cache
