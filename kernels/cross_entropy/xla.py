"""The products of head and cross-entropy in plain XLA."""

import jax.numpy as jnp
from jax import Array, lax

from kernels.cross_entropy.chunks import Exponentials, Factors, Products
from kernels.precision import product_precision


def _exponentials(
    hidden: Array, head: Array, targets: Array, shift: Array, keep: bool
) -> Exponentials:
    logits = _dot(hidden, head)
    centred = logits - shift[:, None]
    exps = jnp.exp(centred)
    target = jnp.where(_one_hot(targets, logits.shape), centred, 0).sum(-1)
    total, kept = exps.sum(-1), exps if keep else None
    if keep and hidden.dtype == jnp.bfloat16:
        # Without the barrier XLA would keep them in float32, the type in which they are used next.
        kept = lax.optimization_barrier(exps.astype(jnp.bfloat16))
    return Exponentials(kept, total, target, logits.max(-1))


def _gradients(
    exps: Array, hidden: Array, head: Array, targets: Array, factors: Factors
) -> tuple[Array, Array]:
    scale, *others = factors
    of_target, of_others = ((scale * factor)[:, None] for factor in others)
    dlogits = exps.astype(jnp.float32) * of_others
    dlogits = jnp.where(_one_hot(targets, exps.shape), of_target, dlogits).astype(hidden.dtype)
    return _dot(dlogits, head.T), _dot(hidden.T, dlogits)


PRODUCTS = Products(_exponentials, _gradients)


def _one_hot(targets: Array, shape: tuple[int, ...]) -> Array:
    """Return where the targets are, [n, V] booleans: on a TPU faster than a gather or a scatter."""
    return lax.broadcasted_iota(targets.dtype, shape, 1) == targets[:, None]


def _dot(a: Array, b: Array) -> Array:
    precision = product_precision(a.dtype)
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
