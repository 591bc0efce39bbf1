"""Routes: which tokens a learned split sends to attention, by their scores.

A `Quota` of r in windows of m tokens is filled causally. Token i of a window goes to attention if
its score passes (is above 0) and fewer than r tokens before it did, or if attention needs all that
are left of the window. With C_i the number of scores up to i that pass, the number of tokens up to
i that go to attention is therefore

  A_i = min(r, max(C_i, r - (m - 1 - i))),

because r - (m - 1 - i), the least number that keeps r within reach, grows by 1 with every token:
once it is above C_i, it stays above it to the end of the window. A route depends on no later token,
and each whole window sends exactly r.

So shapes are static. A last window of t < m tokens has min(r, t) slots for attention and
min(m - r, t) for the SSM. Unused slots are the last ones, which causality hides; they hold copies
of the last token, whose outputs `merge_routed` drops.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowhn_jax.split.selection import Quota


class Routes(NamedTuple):
    """Where the tokens of sequences go.

    Attributes:
      attends: [B, T] bool, whether a token goes to attention.
      order: [B, W, m] int32, the offsets of each window's tokens, those of attention first, both
        branches' in order of position.
      slots: [B, W, m] int32, the slot of each token in `order`, its inverse.
    """

    attends: jax.Array
    order: jax.Array
    slots: jax.Array


def make_routes(scores: jax.Array, quota: Quota) -> Routes:
    """Return the routes of tokens with `scores` [B, T], of which attention has the quota."""
    batch, length = scores.shape
    passes = _fold(scores > 0, quota.period).astype(jnp.int32)
    offsets = jnp.arange(quota.period)
    least = offsets - (quota.period - 1 - quota.width)
    attended = jnp.minimum(quota.width, jnp.maximum(jnp.cumsum(passes, 2), least))
    attends = jnp.diff(attended, axis=2, prepend=0) > 0
    slots = jnp.where(attends, attended - 1, quota.width + offsets - attended)
    routes = attends.reshape(batch, -1)[:, :length]
    return Routes(routes, jnp.argsort(slots, axis=2), slots)


def step_routes(
    scores: jax.Array, positions: jax.Array, attended: jax.Array, quota: Quota
) -> tuple[jax.Array, jax.Array]:
    """Return which tokens go to attention, [B] bool, and the resulting `attended`.

    Args:
      scores: [B], of one token per sequence.
      positions: [B], of these tokens.
      attended: [B] int32, how many tokens before them went to attention in their windows; not read
        where a window begins.
      quota: the quota of attention.
    """
    offsets = positions % quota.period
    attended = jnp.where(offsets == 0, 0, attended)
    left = quota.width - attended
    attends = (left > 0) & ((scores > 0) | (left == quota.period - offsets))
    return attends, attended + attends


def count_attended(routes: Routes, lengths: jax.Array) -> jax.Array:
    """Return how many of the first `lengths` [B] tokens go to attention: [B] int32."""
    is_before = jnp.arange(routes.attends.shape[1]) < lengths[:, None]
    return (routes.attends & is_before).sum(1, dtype=jnp.int32)


def take_routed(x: jax.Array, routes: Routes, quota: Quota) -> tuple[jax.Array, jax.Array]:
    """Return the tokens of attention and of the SSM, both in order of position.

    Args:
      x: [B, T, ...].
      routes: the routes of its tokens.
      quota: the quota of attention.

    Returns:
      [B, quota.count(T), ...] and [B, quota.complement().count(T), ...].
    """
    batch, length, *rest = x.shape
    ordered = _reorder(_fold(x, quota.period), routes.order, routes.slots)
    attention, ssm = (
        branch.reshape(batch, -1, *rest) for branch in jnp.split(ordered, [quota.width], axis=2)
    )
    return attention[:, : quota.count(length)], ssm[:, : quota.complement().count(length)]


def merge_routed(attention: jax.Array, ssm: jax.Array, routes: Routes, quota: Quota) -> jax.Array:
    """Return [B, T, ...] from the branches' outputs for what `take_routed` gave them."""
    batch, windows, _ = routes.order.shape
    folded = []
    for branch, each in ((attention, quota), (ssm, quota.complement())):
        _, slots, *rest = branch.shape
        free = ((0, 0), (0, windows * each.width - slots), *[(0, 0)] * len(rest))
        folded.append(jnp.pad(branch, free).reshape(batch, windows, each.width, *rest))
    merged = _reorder(jnp.concatenate(folded, axis=2), routes.slots, routes.order)
    return merged.reshape(batch, -1, *merged.shape[3:])[:, : routes.attends.shape[1]]


def _fold(x: jax.Array, period: int) -> jax.Array:
    """Return x [B, T, ...] and copies of its last token as windows [B, W, period, ...]."""
    batch, length, *rest = x.shape
    tail = ((0, 0), (0, -length % period), *[(0, 0)] * len(rest))
    return jnp.pad(x, tail, mode="edge").reshape(batch, -1, period, *rest)


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Return the tokens of windows x [B, W, m, ...] in another order [B, W, m].

    `inverse` is the order that undoes it: so the gradient is a gather too, not a scatter.
    """
    del inverse
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 3)), axis=2)


def _reorder_forward(x, order, inverse):
    return _reorder(x, order, inverse), (order, inverse)


def _reorder_backward(orders, gradient):
    order, inverse = orders
    return _reorder(gradient, inverse, order), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
