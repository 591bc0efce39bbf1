"""Checks of the arguments of a model's public functions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flowhn_jax.models.base import ModelConfig


class TokenCheckedFunction:
    """A jitted function of (config, params, tokens, ...) whose token ids are checked first.

    All other attributes, such as `lower`, are those of the jitted function.
    """

    def __init__(self, jitted: Any, layout: str):
        functools.update_wrapper(self, jitted)
        self._jitted, self._layout = jitted, layout.split()

    def __call__(
        self, config: ModelConfig, params: Any, tokens: jax.Array, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the function; raise ValueError where the tokens cannot be read."""
        name = self.__name__
        _check_tokens(name, tokens, self._layout, config.vocab_size)
        lengths = kwargs.get("lengths", args[0] if name == "prefill" and args else None)
        if lengths is not None:
            _check_range(name, "lengths", lengths, 1, tokens.shape[1])
        return self._jitted(config, params, tokens, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def checks_tokens(layout: str) -> Callable[[Any], TokenCheckedFunction]:
    """Return a decorator of jitted functions whose tokens have the layout 'B T' or 'B'."""
    return functools.partial(TokenCheckedFunction, layout=layout)


def _check_tokens(function: str, tokens: Any, layout: list[str], vocab_size: int) -> None:
    expected = f"models.{function}: tokens must be integers [{', '.join(layout)}]"
    if not (hasattr(tokens, "shape") and hasattr(tokens, "dtype")):
        raise ValueError(f"{expected}; got {type(tokens).__name__}.")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{expected}; got {tokens.dtype}.")
    if len(tokens.shape) != len(layout) or 0 in tokens.shape:
        raise ValueError(f"{expected} with at least one token; got shape {tokens.shape}.")
    _check_range(function, "tokens", tokens, 0, vocab_size - 1)


def _check_range(function: str, name: str, values: Any, low: int, high: int) -> None:
    """Raise ValueError where values are known and outside low..high."""
    if isinstance(values, Tracer):
        return
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        return  # spread over several processes, none of which has all values
    values = np.asarray(values)
    outside = values[(values < low) | (values > high)]
    if outside.size:
        raise ValueError(
            f"models.{function}: {name} must be {low} to {high}; got {outside.flat[0]}."
        )
