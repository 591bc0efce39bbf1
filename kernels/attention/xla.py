"""Causal attention in plain XLA.

Queries go in a few blocks, each against no keys but those from the first to the last that it can
see: about half of the scores are never computed, and those of a block stay near the caches. The
weights are divided by their sum after the product with the values. On a CPU that takes a half
(T = 128) to a quarter (T = 1024) of the time of `jax.nn.dot_product_attention`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.manual_axes import vary_alike
from kernels.precision import product_precision

_BLOCKS = 8  # at most, as each is compiled on its own
_SMALLEST_BLOCK = 64


class _Sight(NamedTuple):
    """What a query may see besides its causal past: as `kernels.attention.attention` says."""

    window: int | None
    prefix: int


class _Block(NamedTuple):
    """Queries start..stop, which see no keys but the prefix and those from `first` to `stop`."""

    prefix: int
    first: int
    start: int
    stop: int

    def keys(self, x: Array, axis: int) -> Array:
        """The part of x that the queries see."""
        seen = jax.lax.slice_in_dim(x, self.first, self.stop, axis=axis)
        if not self.prefix:
            return seen
        return jnp.concatenate((jax.lax.slice_in_dim(x, 0, self.prefix, axis=axis), seen), axis)

    def spread(self, x: Array, length: int) -> Array:
        """x [B, G, keys, K] at their places among `length` keys, with zeros elsewhere."""
        between, behind = self.first - self.prefix, length - self.stop
        parts = [x[:, :, self.prefix :]]
        if self.prefix:
            parts.insert(0, x[:, :, : self.prefix])
        padding = [(between, behind)] if len(parts) == 1 else [(0, between), (0, behind)]
        padded = [
            jnp.pad(part, ((0, 0), (0, 0), pad, (0, 0)))
            for part, pad in zip(parts, padding, strict=True)
        ]
        return jnp.concatenate(padded, axis=2)


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    window: int | None = None,
    prefix: int = 0,
) -> Array:
    """Attend; arguments and result as in `kernels.attention.attention`."""
    q, k, v = vary_alike((q, k, v))
    q = jnp.moveaxis(q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]), 1, 3)
    sight = _Sight(window, prefix)
    out = _attend(sight, q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), segment_ids)
    out = jnp.moveaxis(out, 3, 1)  # [B, T, G, R, K]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sight: _Sight, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """q [B, G, R, T, K] on k, v [B, G, T, K], of G key-value heads with R query heads each."""
    return _attend_forward(sight, q, k, v, segment_ids)[0]


def _attend_forward(sight: _Sight, q: Array, k: Array, v: Array, segment_ids: Array | None):
    outputs, weighings = [], []
    positions = jnp.arange(q.shape[3])
    for block in _blocks(q.shape[3], sight):
        queries = slice(block.start, block.stop)
        seen = block.keys(positions, 0)
        distance = positions[queries, None] - seen
        mask = distance >= 0
        if sight.window is not None:
            mask &= (distance < sight.window) | (seen < sight.prefix)
        if segment_ids is not None:
            same = segment_ids[:, queries, None] == block.keys(segment_ids, 1)[:, None]
            mask = (mask & (same | (seen < sight.prefix)))[:, None, None]
        # [queries, keys], or [B, 1, 1, queries, keys]
        scores = _einsum("bgrnk,bgmk->bgrnm", q[:, :, :, queries], block.keys(k, 2))
        scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        weights = weights.astype(v.dtype)
        out = _einsum("bgrnm,bgmk->bgrnk", weights, block.keys(v, 2)) / total
        outputs.append(out.astype(q.dtype))
        weighings.append((weights, total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, out, weighings)


def _attend_backward(sight: _Sight, residuals, dout: Array):
    # Written by hand for precision: autodiff would round the weights' gradient to their dtype
    # before it cancels against dout * out, and the parts of dk and dv before their sum.
    q, k, v, out, weighings = residuals
    dqs, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for block, (weights, total) in zip(_blocks(q.shape[3], sight), weighings, strict=True):
        q_i, out_i, dout_i = (x[:, :, :, block.start : block.stop] for x in (q, out, dout))
        dweights = _einsum("bgrnk,bgmk->bgrnm", dout_i, block.keys(v, 2))
        dtotal = _einsum("bgrnk,bgrnk->bgrn", dout_i, out_i)[..., None]
        dscores = weights * (dweights - dtotal) * (q.shape[-1] ** -0.5 / total)
        dscores = dscores.astype(q.dtype)
        dqs.append(_einsum("bgrnm,bgmk->bgrnk", dscores, block.keys(k, 2)).astype(q.dtype))
        dk_i = _einsum("bgrnm,bgrnk->bgmk", dscores, q_i)
        dv_i = _einsum("bgrnm,bgrnk->bgmk", weights, (dout_i / total).astype(v.dtype))
        length = k.shape[2]
        dk, dv = dk + block.spread(dk_i, length), dv + block.spread(dv_i, length)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _einsum(equation: str, a: Array, b: Array) -> Array:
    precision = product_precision(jnp.result_type(a, b))
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _blocks(length: int, sight: _Sight) -> list[_Block]:
    size = max(_SMALLEST_BLOCK, -(-length // _BLOCKS))
    blocks = []
    for start in range(0, length, size):
        first = 0 if sight.window is None else max(0, start - sight.window + 1)
        apart = sight.prefix < first  # else what is seen is one run
        first, prefix = (first, sight.prefix) if apart else (0, 0)
        blocks.append(_Block(prefix, first, start, min(start + size, length)))
    return blocks
