"""Functions with hand-written gradients."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def custom_vjp(
    *, nondiff_argnums: tuple[int, ...]
) -> Callable[[Callable[..., Result]], jax.custom_vjp[Result]]:
    """Return `jax.custom_vjp` as a decorator that keeps the type of the function's results."""

    def decorate(function: Callable[..., Result]) -> jax.custom_vjp[Result]:
        # JAX annotates it as one of two implementations with the same interface.
        differentiable: Any = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)
        return differentiable

    return decorate
