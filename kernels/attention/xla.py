"""Causal attention in plain XLA.

Queries are processed in a few blocks, each against the keys from the first to the last that it can
see: about half of the scores are never computed, and those of a block fit in caches. The weights
are divided by their sum after the product with the values. On a CPU that takes a half (T = 128) to
a quarter (T = 1024) of the time of `jax.nn.dot_product_attention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.attention.inputs import AttentionInputs, Visibility
from kernels.custom_vjp import custom_vjp
from kernels.manual_axes import vary_alike
from kernels.precision import einsum_to_float32 as _einsum

_MAX_BLOCKS = 8  # each is compiled separately
_MIN_BLOCK = 64


class _Block(NamedTuple):
    """Queries start..stop, which see only the keys of the prefix and those of first..last."""

    prefix: int
    first: int
    last: int
    start: int
    stop: int

    def keys(self, x: Array, axis: int) -> Array:
        """Return the part of x at the keys that the queries see."""
        seen = jax.lax.slice_in_dim(x, self.first, self.last, axis=axis)
        if not self.prefix:
            return seen
        return jnp.concatenate((jax.lax.slice_in_dim(x, 0, self.prefix, axis=axis), seen), axis)

    def spread(self, x: Array, length: int) -> Array:
        """Return x [B, G, keys, K] at their positions among `length` keys, zeros elsewhere."""
        between, after = self.first - self.prefix, length - self.last
        parts = [x[:, :, self.prefix :]]
        if self.prefix:
            parts.insert(0, x[:, :, : self.prefix])
        padding = [(between, after)] if len(parts) == 1 else [(0, between), (0, after)]
        padded = [
            jnp.pad(part, ((0, 0), (0, 0), pad, (0, 0)))
            for part, pad in zip(parts, padding, strict=True)
        ]
        return jnp.concatenate(padded, axis=2)


def attention(inputs: AttentionInputs, visibility: Visibility, scale: float) -> Array:
    """Return the output of `kernels.attention.attention`."""
    q, k, v = vary_alike((inputs.q, inputs.k, inputs.v))
    q = jnp.moveaxis(q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    out = _attend(visibility, scale, q, k, v, inputs.segment_ids)
    out = jnp.moveaxis(out, 3, 1)  # [B, T, G, R, K]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


@custom_vjp(nondiff_argnums=(0, 1))
def _attend(
    visibility: Visibility, scale: float, q: Array, k: Array, v: Array, ids: Array | None
) -> Array:
    """Return [B, G, R, Q, K] from q, of the same shape, and k, v [B, G, T, K].

    G is the number of key-value heads, each of which has R query heads.
    """
    return _attend_forward(visibility, scale, q, k, v, ids)[0]


def _attend_forward(
    visibility: Visibility, scale: float, q: Array, k: Array, v: Array, ids: Array | None
):
    outputs, weighings = [], []
    positions = jnp.arange(k.shape[2])
    for block in _blocks(q.shape[3], visibility):
        queries = slice(block.start, block.stop)
        at = queries if visibility.queries is None else np.array(visibility.queries[queries])
        seen = block.keys(positions, 0)
        distance = positions[at, None] - seen
        mask = distance >= 0
        if visibility.window is not None:
            mask &= (distance < visibility.window) | (seen < visibility.prefix)
        if ids is not None:
            same = ids[:, at, None] == block.keys(ids, 1)[:, None]
            mask = (mask & (same | (seen < visibility.prefix)))[:, None, None]
        # [queries, keys], or [B, 1, 1, queries, keys]
        scores = _einsum("bgrnk,bgmk->bgrnm", q[:, :, :, queries], block.keys(k, 2))
        scores = jnp.where(mask, scores * scale, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        weights = weights.astype(v.dtype)
        out = _einsum("bgrnm,bgmk->bgrnk", weights, block.keys(v, 2)) / total
        outputs.append(out.astype(q.dtype))
        weighings.append((weights, total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, out, weighings)


def _attend_backward(visibility: Visibility, scale: float, residuals, dout: Array):
    # Written by hand for precision: autodiff would round the weights' gradient to their dtype
    # before it cancels with dout * out, and the parts of dk and dv before they are added.
    q, k, v, out, weighings = residuals
    dqs, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for block, (weights, total) in zip(_blocks(q.shape[3], visibility), weighings, strict=True):
        q_i, out_i, dout_i = (x[:, :, :, block.start : block.stop] for x in (q, out, dout))
        dweights = _einsum("bgrnk,bgmk->bgrnm", dout_i, block.keys(v, 2))
        dtotal = _einsum("bgrnk,bgrnk->bgrn", dout_i, out_i)[..., None]
        dscores = weights * (dweights - dtotal) * (scale / total)
        dscores = dscores.astype(q.dtype)
        dqs.append(_einsum("bgrnm,bgmk->bgrnk", dscores, block.keys(k, 2)).astype(q.dtype))
        dk_i = _einsum("bgrnm,bgrnk->bgmk", dscores, q_i)
        dv_i = _einsum("bgrnm,bgrnk->bgmk", weights, (dout_i / total).astype(v.dtype))
        length = k.shape[2]
        dk, dv = dk + block.spread(dk_i, length), dv + block.spread(dv_i, length)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(length: int, visibility: Visibility) -> list[_Block]:
    size = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    blocks = []
    positions = range(length) if visibility.queries is None else visibility.queries
    for start in range(0, length, size):
        stop = min(start + size, length)
        window = visibility.window
        first = 0 if window is None else max(0, positions[start] - window + 1)
        has_gap = visibility.prefix < first  # otherwise the visible keys are one run
        first, prefix = (first, visibility.prefix) if has_gap else (0, 0)
        blocks.append(_Block(prefix, first, positions[stop - 1] + 1, start, stop))
    return blocks
