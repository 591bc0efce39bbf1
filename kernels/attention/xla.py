"""Causal attention in plain XLA.

Queries go in a few blocks, each against no keys but those from the first to the last that it can
see: about half of the scores are never computed, and those of a block stay near the caches. The
weights are divided by their sum after the product with the values. On a CPU that takes a half
(T = 128) to a quarter (T = 1024) of the time of `jax.nn.dot_product_attention`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels.manual_axes import vary_alike
from kernels.precision import product_precision

_BLOCKS = 8  # at most, as each is compiled on its own
_SMALLEST_BLOCK = 64


def attention(
    q: Array, k: Array, v: Array, segment_ids: Array | None, *, window: int | None = None
) -> Array:
    """Attend; arguments and result as in `kernels.attention.attention`."""
    q, k, v = vary_alike((q, k, v))
    q = jnp.moveaxis(q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]), 1, 3)
    out = _attend(window, q, jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2), segment_ids)
    out = jnp.moveaxis(out, 3, 1)  # [B, T, G, R, K]
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int | None, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    """q [B, G, R, T, K] on k, v [B, G, T, K], of G key-value heads with R query heads each."""
    return _attend_forward(window, q, k, v, segment_ids)[0]


def _attend_forward(window: int | None, q: Array, k: Array, v: Array, segment_ids: Array | None):
    outputs, weighings = [], []
    for first, start, stop in _blocks(q.shape[3], window):
        distance = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
        if segment_ids is not None:
            same = segment_ids[:, start:stop, None] == segment_ids[:, None, first:stop]
            mask = (mask & same)[:, None, None]  # [B, 1, 1, queries, keys]
        scores = _einsum("bgrnk,bgmk->bgrnm", q[:, :, :, start:stop], k[:, :, first:stop])
        scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        weights = weights.astype(v.dtype)
        out = _einsum("bgrnm,bgmk->bgrnk", weights, v[:, :, first:stop]) / total
        outputs.append(out.astype(q.dtype))
        weighings.append((weights, total))
    out = jnp.concatenate(outputs, axis=3)
    return out, (q, k, v, out, weighings)


def _attend_backward(window: int | None, residuals, dout: Array):
    # Written by hand for precision: autodiff would round the weights' gradient to their dtype
    # before it cancels against dout * out, and the parts of dk and dv before their sum.
    q, k, v, out, weighings = residuals
    dqs, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    blocks = _blocks(q.shape[3], window)
    for (first, start, stop), (weights, total) in zip(blocks, weighings, strict=True):
        q_i, out_i, dout_i = (x[:, :, :, start:stop] for x in (q, out, dout))
        dweights = _einsum("bgrnk,bgmk->bgrnm", dout_i, v[:, :, first:stop])
        dtotal = _einsum("bgrnk,bgrnk->bgrn", dout_i, out_i)[..., None]
        dscores = weights * (dweights - dtotal) * (q.shape[-1] ** -0.5 / total)
        dscores = dscores.astype(q.dtype)
        dqs.append(_einsum("bgrnm,bgmk->bgrnk", dscores, k[:, :, first:stop]).astype(q.dtype))
        dk_i = _einsum("bgrnm,bgrnk->bgmk", dscores, q_i)
        dv_i = _einsum("bgrnm,bgrnk->bgmk", weights, (dout_i / total).astype(v.dtype))
        unseen = (0, 0), (0, 0), (first, k.shape[2] - stop), (0, 0)
        dk, dv = dk + jnp.pad(dk_i, unseen), dv + jnp.pad(dv_i, unseen)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _einsum(equation: str, a: Array, b: Array) -> Array:
    precision = product_precision(jnp.result_type(a, b))
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _blocks(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first key seen, start, stop) of each block of queries."""
    size = max(_SMALLEST_BLOCK, -(-length // _BLOCKS))
    starts = range(0, length, size)
    firsts = [0 if window is None else max(0, start - window + 1) for start in starts]
    return [
        (first, start, min(start + size, length))
        for first, start in zip(firsts, starts, strict=True)
    ]
