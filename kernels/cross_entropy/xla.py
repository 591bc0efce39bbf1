"""Head and cross-entropy in plain XLA, chunk by chunk, so that the logits never exist all at once.

The gradients of a sum follow, up to one scalar, from the logits, so `weighted_sum` computes them in
the forward pass. `token_losses` cannot, and recomputes the logits in the backward pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.custom_vjp import custom_vjp
from kernels.precision import product_precision


class Options(NamedTuple):
    """Options of the functions of this file.

    The axes are those of `jax.shard_map` without `check_vma`, where each device returns its part of
    the gradient of an array that several devices hold.

    Attributes:
      chunks: number of chunks, which divides the number of tokens.
      z_loss: weight of lse**2.
      vocabulary: axes that the vocabulary is cut over: head and its gradient are a device's part;
        hidden, targets and weights are the same on all devices along them.
      shards: axes that the head's D is cut over. `weighted_sum` gathers the head, and returns each
        device's part of the gradient.
      tokens: axes that the tokens are cut over; for `weighted_sum` only.
    """

    chunks: int
    z_loss: float
    vocabulary: tuple[str, ...] = ()
    shards: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


@custom_vjp(nondiff_argnums=(0,))
def weighted_sum(
    options: Options, hidden: Array, head: Array, targets: Array, weights: Array
) -> Array:
    """Return the sum of weights * losses over all devices, a float32 scalar.

    hidden is [N, D], head [D, V].
    """
    head = gather_head(head.astype(hidden.dtype), options.shards)
    losses = token_losses(options, hidden, head, targets)
    return _over(lax.psum, options.tokens, jnp.sum(weights * losses))


def _weighted_sum_forward(options, hidden, head, targets, weights):
    whole = gather_head(head.astype(hidden.dtype), options.shards)
    losses, dhidden, dhead = _losses_and_gradients(options, hidden, whole, targets, weights)
    for axis in options.shards:  # one by one: XLA sums whole arrays over a whole slice of TPUs
        dhead = lax.psum_scatter(dhead, axis, tiled=True)
    total = _over(lax.psum, options.tokens, jnp.sum(weights * losses))
    return total, (losses, dhidden, dhead.astype(head.dtype))


def _weighted_sum_backward(options, residuals, dtotal):
    losses, dhidden, dhead = residuals
    dtotal = _over(lax.psum, options.tokens, dtotal)
    dweights = dtotal * losses
    dtotal = _over(lax.psum, options.vocabulary, dtotal)
    dhidden, dhead = ((dtotal * x).astype(x.dtype) for x in (dhidden, dhead))
    return dhidden, dhead, None, dweights


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def gather_head(head: Array, shards: tuple[str, ...]) -> Array:
    """Return the head with its whole D, of which each device along the axes has a part."""
    for axis in reversed(shards):
        head = lax.all_gather(head, axis, tiled=True)
    return head


@custom_vjp(nondiff_argnums=(0,))
def token_losses(options: Options, hidden: Array, head: Array, targets: Array) -> Array:
    """Return losses [N] in float32, without weights; hidden is [N, D], head [D, V]."""
    head = head.astype(hidden.dtype)

    def step(_, chunk):
        return None, _chunk(options, head, *chunk).losses

    return _join(lax.scan(step, None, _split((hidden, targets), options.chunks))[1])


def _token_losses_forward(options, hidden, head, targets):
    return token_losses(options, hidden, head, targets), (hidden, head, targets)


def _token_losses_backward(options, residuals, dlosses):
    hidden, head, targets = residuals
    dlosses = _over(lax.psum, options.vocabulary, dlosses)
    _, dhidden, dhead = _losses_and_gradients(options, hidden, head, targets, dlosses)
    return dhidden, dhead.astype(head.dtype), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _losses_and_gradients(
    options: Options, hidden: Array, head: Array, targets: Array, scale: Array
):
    """Return losses [N], and the gradients [N, D] and [D, V] of sum(scale * losses)."""
    product_head = head.astype(hidden.dtype)

    def step(dhead, chunk):
        hidden, targets, scale = chunk
        losses, lse, softmax, hit = _chunk(options, product_head, hidden, targets)
        if options.z_loss:
            softmax = softmax * (1 + 2 * options.z_loss * lse)[:, None]
        dlogits = ((softmax - hit) * scale[:, None]).astype(hidden.dtype)
        dhead = dhead + _dot(hidden.T, dlogits)
        return dhead, (losses, _dot(dlogits, product_head.T).astype(hidden.dtype))

    dhead = jnp.zeros_like(head, jnp.float32)
    dhead, outputs = lax.scan(step, dhead, _split((hidden, targets, scale), options.chunks))
    return *map(_join, outputs), dhead


class _Chunk(NamedTuple):
    """Results for a chunk of n tokens and a device's part of the vocabulary."""

    losses: Array  # [n] float32
    lse: Array  # logsumexp of the logits [n] float32
    softmax: Array  # [n, V] float32
    hit: Array  # the targets one-hot, [n, V] bool


def _chunk(options: Options, head: Array, hidden: Array, targets: Array) -> _Chunk:
    axes = options.vocabulary
    logits = _dot(hidden, head)
    peak = _over(lax.pmax, axes, logits.max(-1, keepdims=True))
    exps = jnp.exp(logits - peak)
    total = _over(lax.psum, axes, exps.sum(-1, keepdims=True))
    lse = (peak + jnp.log(total))[:, 0]
    first = lax.axis_index(axes) * logits.shape[1] if axes else 0
    # A comparison instead of a gather: a target may be in another device's part.
    hit = first + lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    losses = lse - _over(lax.psum, axes, jnp.where(hit, logits, 0).sum(-1))
    if options.z_loss:
        losses = losses + options.z_loss * lse**2
    return _Chunk(losses, lse, exps / total, hit)


def _over(collective, axes: tuple[str, ...], x: Array) -> Array:
    """Return the collective's result on x over the devices along the axes; x if there are none."""
    return collective(x, axes) if axes else x


def _dot(a: Array, b: Array) -> Array:
    precision = product_precision(a.dtype)
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _split(arrays, chunks: int):
    """Return arrays [N, ...] as [chunks, N / chunks, ...]."""
    return jax.tree.map(lambda x: x.reshape(chunks, len(x) // chunks, *x.shape[1:]), arrays)


def _join(x: Array) -> Array:
    """Return x [chunks, n, ...] as [chunks * n, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
