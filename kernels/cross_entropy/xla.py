"""Head and cross-entropy in plain XLA, chunk by chunk, so that the logits never exist whole.

The gradients of a sum are known, up to one scalar, as soon as the logits are: `weighted_sum` forms
them in the forward pass. `token_losses` cannot, and computes the logits again in the backward pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

_dot = partial(jnp.dot, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(chunks: int, hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    """Sum of weights * losses, a float32 scalar; hidden [N, D], N a multiple of `chunks`."""
    return jnp.sum(weights * token_losses(chunks, hidden, head, targets))


def _weighted_sum_forward(chunks, hidden, head, targets, weights):
    losses, dhidden, dhead = _losses_and_gradients(chunks, hidden, head, targets, weights)
    return jnp.sum(weights * losses), (losses, dhidden, dhead)


def _weighted_sum_backward(chunks, residuals, dtotal):
    losses, dhidden, dhead = residuals
    dhidden, dhead = ((dtotal * x).astype(x.dtype) for x in (dhidden, dhead))
    return dhidden, dhead, None, dtotal * losses


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(chunks: int, hidden: Array, head: Array, targets: Array) -> Array:
    """Losses [N] float32, not weighted; hidden [N, D], N a multiple of `chunks`."""
    head = head.astype(hidden.dtype)

    def step(_, chunk):
        hidden, targets = chunk
        return None, _losses_and_softmax(hidden, head, targets)[0]

    return _join(lax.scan(step, None, _split((hidden, targets), chunks))[1])


def _token_losses_forward(chunks, hidden, head, targets):
    return token_losses(chunks, hidden, head, targets), (hidden, head, targets)


def _token_losses_backward(chunks, residuals, dlosses):
    _, dhidden, dhead = _losses_and_gradients(chunks, *residuals, dlosses)
    return dhidden, dhead, None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _losses_and_gradients(chunks: int, hidden: Array, head: Array, targets: Array, scale: Array):
    """Losses [N], and dhidden [N, D] and dhead [D, V] of sum(scale * losses), in their dtypes."""
    product_head = head.astype(hidden.dtype)

    def step(dhead, chunk):
        hidden, targets, scale = chunk
        losses, softmax, hit = _losses_and_softmax(hidden, product_head, targets)
        dlogits = ((softmax - hit) * scale[:, None]).astype(hidden.dtype)
        dhead = dhead + _dot(hidden.T, dlogits)
        return dhead, (losses, _dot(dlogits, product_head.T).astype(hidden.dtype))

    dhead = jnp.zeros_like(head, jnp.float32)
    dhead, outputs = lax.scan(step, dhead, _split((hidden, targets, scale), chunks))
    return *map(_join, outputs), dhead.astype(head.dtype)


def _losses_and_softmax(hidden: Array, head: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Losses [n], softmax [n, V] float32 and the targets one-hot [n, V] bool of one chunk."""
    logits = _dot(hidden, head)
    peak = logits.max(-1, keepdims=True)
    exps = jnp.exp(logits - peak)
    total = exps.sum(-1, keepdims=True)
    # Compared, not gathered: that stays local where the vocabulary is sharded.
    hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    losses = (peak + jnp.log(total))[:, 0] - jnp.where(hit, logits, 0).sum(-1)
    return losses, exps / total, hit


def _split(arrays, chunks: int):
    """[N, ...] -> [chunks, N / chunks, ...]; chunk i takes every chunks-th token from token i on.

    So a chunk holds an equal part of every device's tokens where these are sharded.
    """
    return jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1), arrays)


def _join(x: Array) -> Array:
    """The inverse of `_split` for one array."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
