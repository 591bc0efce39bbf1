"""Head and cross-entropy in plain XLA, chunk by chunk, so that the logits never exist whole.

The gradients of a sum are known, up to one scalar, as soon as the logits are: `weighted_sum` forms
them in the forward pass. `token_losses` cannot, and computes the logits again in the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.precision import product_precision


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_sum(
    chunks: int, z_loss: float, hidden: Array, head: Array, targets: Array, weights: Array
) -> Array:
    """Sum of weights * losses, a float32 scalar; hidden [N, D], N a multiple of `chunks`."""
    return jnp.sum(weights * token_losses(chunks, z_loss, hidden, head, targets))


def _weighted_sum_forward(chunks, z_loss, hidden, head, targets, weights):
    losses, dhidden, dhead = _losses_and_gradients(chunks, z_loss, hidden, head, targets, weights)
    return jnp.sum(weights * losses), (losses, dhidden, dhead)


def _weighted_sum_backward(chunks, z_loss, residuals, dtotal):
    losses, dhidden, dhead = residuals
    dhidden, dhead = ((dtotal * x).astype(x.dtype) for x in (dhidden, dhead))
    return dhidden, dhead, None, dtotal * losses


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_losses(chunks: int, z_loss: float, hidden: Array, head: Array, targets: Array) -> Array:
    """Losses [N] float32, not weighted; hidden [N, D], N a multiple of `chunks`."""
    head = head.astype(hidden.dtype)

    def step(_, chunk):
        return None, _chunk(z_loss, head, *chunk).losses

    return _join(lax.scan(step, None, _split((hidden, targets), chunks))[1])


def _token_losses_forward(chunks, z_loss, hidden, head, targets):
    return token_losses(chunks, z_loss, hidden, head, targets), (hidden, head, targets)


def _token_losses_backward(chunks, z_loss, residuals, dlosses):
    _, dhidden, dhead = _losses_and_gradients(chunks, z_loss, *residuals, dlosses)
    return dhidden, dhead, None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _losses_and_gradients(
    chunks: int, z_loss: float, hidden: Array, head: Array, targets: Array, scale: Array
):
    """Losses [N], and dhidden [N, D] and dhead [D, V] of sum(scale * losses), in their dtypes."""
    product_head = head.astype(hidden.dtype)

    def step(dhead, chunk):
        hidden, targets, scale = chunk
        losses, lse, softmax, hit = _chunk(z_loss, product_head, hidden, targets)
        if z_loss:
            softmax = softmax * (1 + 2 * z_loss * lse)[:, None]
        dlogits = ((softmax - hit) * scale[:, None]).astype(hidden.dtype)
        dhead = dhead + _dot(hidden.T, dlogits)
        return dhead, (losses, _dot(dlogits, product_head.T).astype(hidden.dtype))

    dhead = jnp.zeros_like(head, jnp.float32)
    dhead, outputs = lax.scan(step, dhead, _split((hidden, targets, scale), chunks))
    return *map(_join, outputs), dhead.astype(head.dtype)


class _Chunk(NamedTuple):
    """What the loss and its gradients need of n tokens."""

    losses: Array  # [n] float32
    lse: Array  # logsumexp of the logits [n] float32
    softmax: Array  # [n, V] float32
    hit: Array  # the targets one-hot, [n, V] bool


def _chunk(z_loss: float, head: Array, hidden: Array, targets: Array) -> _Chunk:
    logits = _dot(hidden, head)
    peak = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - peak)
    total = exps.sum(-1, keepdims=True)
    lse = (peak + jnp.log(total))[:, 0]
    # Compared, not gathered: that stays local where the vocabulary is sharded.
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    losses = lse - jnp.where(hit, logits, 0).sum(-1)
    if z_loss:
        losses = losses + z_loss * lse**2
    return _Chunk(losses, lse, exps / total, hit)


def _dot(a: Array, b: Array) -> Array:
    precision = product_precision(a.dtype)
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _split(arrays, chunks: int):
    """[N, ...] -> [chunks, N / chunks, ...]."""
    return jax.tree.map(lambda x: x.reshape(chunks, len(x) // chunks, *x.shape[1:]), arrays)


def _join(x: Array) -> Array:
    """The inverse of `_split` for one array."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
