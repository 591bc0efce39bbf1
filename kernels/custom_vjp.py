"""Functions with hand-written gradients, and their results that rematerialization keeps."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

Result = TypeVar("Result")

KERNEL_RESULT = "kernel_result"  # the name of results that `train.remat=dots` keeps


def custom_vjp(
    *, nondiff_argnums: tuple[int, ...]
) -> Callable[[Callable[..., Result]], jax.custom_vjp[Result]]:
    """Return `jax.custom_vjp` as a decorator that keeps the type of the function's results."""

    def decorate(function: Callable[..., Result]) -> jax.custom_vjp[Result]:
        # JAX annotates it as one of two implementations with the same interface.
        differentiable: Any = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)
        return differentiable

    return decorate


def kept_by_remat(results: Result) -> Result:
    """Return the arrays of a tree, named so that a policy of `jax.checkpoint` can keep them.

    Call it in the forward function of a `custom_vjp`, on what the kernel returns: if both the
    outputs and what the gradient needs are kept, the kernel does not run again in the backward
    pass. A name given outside of the forward function has no effect on the latter.
    """
    return jax.tree.map(lambda x: checkpoint_name(x, KERNEL_RESULT), results)
