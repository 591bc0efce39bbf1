"""Decays inside a chunk of state-space duality, and their gradient.

Exponents are differences of sums of the tokens' log-decays. A sum runs over the token's own
document only, as a product with zeros and ones: no document affects another, not even by rounding.
So that differences of large sums stay exact, each log-decay is split into a multiple of 2**-9, of
which all sums are exact in float32, and a rest so small that the rounding of its sums does not
matter. Where a decay is zero the exponent is minus infinity, set before the exponential.

Dimensions: N sequences and groups, R heads of a group, Q tokens of a chunk; t and s are tokens.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

# Lower log-decays are equivalent to minus infinity: exp(-160) and 2**-160 are 0 in float32. A
# chunk's sum of multiples of the grid down to it has 24 bits.
LEAST_EXPONENT, _GRID = -160.0, 2.0**-9
# Tokens that `_sum_across` sums over pair by pair.
_BLOCK = 8


def decays(
    delta: Array, A: Array, document: Array | None, *, s_first: bool = False
) -> tuple[Array, Array, Array]:
    """Return the decays from tokens and the chunk's start to later tokens and the chunk's end.

    Args:
      delta: [N, Q, R].
      A: [N, R].
      document: [N, Q] or None.
      s_first: whether the first result is [..., s, t] rather than [..., t, s].

    Returns:
      [N, R, Q, Q], from token s to t: 0 unless s <= t is of the same document;
      [N, Q, R], from the chunk's start to t: 0 once another document has begun;
      [N, Q, R], from t to the chunk's end: 0 unless the last token's document is t's.
    """
    exponents = jnp.maximum(delta * A[:, None], LEAST_EXPONENT)
    seen = _seen(document, delta.shape[1])
    sums = document_sums(exponents, document)

    def differences(sums: Array) -> Array:
        at_t, at_s = sums[..., :, None], sums[..., None, :]  # [N, R, t, s]
        return at_t.mT - at_s.mT if s_first else at_t - at_s

    seen = (seen.mT if s_first else seen)[:, None]
    exponents = sum(differences(heads_first(v)) for v in sums)
    within = jnp.exp(jnp.where(seen, exponents, -jnp.inf))
    before, after = sum(sums), sum(v[:, -1:] - v for v in sums)
    if document is not None:
        before = jnp.where(document[..., None] == 0, before, -jnp.inf)
        after = jnp.where((document == document[:, -1:])[..., None], after, -jnp.inf)
    return within, jnp.exp(before), jnp.exp(after)


def document_sums(exponents: Array, document: Array | None) -> tuple[Array, Array]:
    """Return the sums of log-decays over the tokens of t's document in the chunk up to t.

    Args:
      exponents: log-decays to any base, at least `LEAST_EXPONENT`, [N, Q, R] float32, Q at most
        128.
      document: [N, Q] or None.

    Returns:
      Two arrays [N, Q, R] whose sum is the result: a multiple of 2**-9, of which differences are
      exact, and a rest of magnitude at most Q * 2**-10. As exact as float32 on every device.
    """
    batch, length, _ = exponents.shape
    coarse = lax.stop_gradient(jnp.round(exponents / _GRID) * _GRID)
    seen = _seen(document, length)
    ones = jnp.broadcast_to(seen, (batch, length, length)).astype(jnp.float32)
    total = partial(jnp.einsum, "nts,nsr->ntr", ones, precision=lax.Precision.HIGHEST)
    return total(coarse), total(exponents - coarse)


def number_documents(segment_ids: Array, chunk: int, length: int) -> Array:
    """Return the documents of each chunk's tokens, numbered 0, 1, ..., [B, length] int32.

    Args:
      segment_ids: documents, [B, L].
      chunk: tokens of a chunk.
      length: a multiple of it, at least L; further tokens are of the last document.
    """
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, length - segment_ids.shape[1])))
    starts = starts.reshape(len(starts), -1, chunk)
    return starts.cumsum(-1, dtype=jnp.int32).reshape(-1, length)


def _seen(document: Array | None, length: int) -> Array:
    """Return whether token s <= t is of t's document, [N or 1, Q, Q] (t, s)."""
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    if document is not None:
        seen &= document[:, :, None] == document[:, None, :]
    return seen


def decays_backward(
    delta: Array, A: Array, of_within: Array, of_before: Array, of_after: Array
) -> tuple[Array, Array]:
    """Return the gradients of delta [N, Q, R] and A [N, R].

    The log-decay of token u is a term of the exponent of each pair s < u <= t, of each decay from
    the start to t >= u and of each decay to the end from t < u. The sums below have these terms and
    no others. Autodiff of `decays` would compute them as differences of whole sums over t and s,
    which lose all digits under strong decay: a token's own pair s = t, whose weight is 1, is part
    of both.

    Args:
      delta: as in `decays`.
      A: as in `decays`.
      of_within: gradient of the exponents of pairs, [N, R, Q, Q] (s, t), 0 for pairs that are not
        seen.
      of_before: gradient of the exponents from the chunk's start to t, [N, Q, R].
      of_after: gradient of the exponents from t to the chunk's end, [N, Q, R].
    """
    of_pairs = _sum_across(of_within)
    of_starts = lax.cumsum(of_before, axis=1, reverse=True)
    of_ends = jnp.pad(lax.cumsum(of_after, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    dexponents = tokens_first(of_pairs) + of_starts + of_ends
    dexponents = jnp.where(delta * A[:, None] > LEAST_EXPONENT, dexponents, 0)
    return dexponents * A[:, None], (dexponents * delta).sum(1)


def _sum_across(x: Array) -> Array:
    """Return the sums of x [N, R, Q, Q] (s, t) over s < u <= t for each u, [N, R, Q].

    By blocks of tokens, for u in block k: pairs with s in a block before k and t in one after it,
    with only one of them in block k, and with both in it. x is read three times; two cumulative
    sums over it, as products with triangular matrices, would cost more than the rest of a chunk.
    """
    *batch, length, _ = x.shape
    block = min(_BLOCK, length)
    tail = -length % block
    x = jnp.pad(x, (*((0, 0),) * len(batch), (0, tail), (0, tail)))
    padded = length + tail
    blocks = padded // block
    k, of_token = jnp.arange(blocks), jnp.arange(padded) // block

    over_block = x.reshape(*batch, blocks, block, padded).sum(-2)  # [..., s block, t]
    earlier = (k[:, None] > k).astype(jnp.float32)
    before = jnp.einsum("kb,...bt->...kt", earlier, over_block, precision=lax.Precision.HIGHEST)
    around = jnp.where(of_token > k[:, None], before, 0).sum(-1)  # [..., k]
    to_t = jnp.where(of_token == k[:, None], before, 0).sum(-2)  # [..., t]
    from_s = jnp.where(of_token > of_token[:, None], x, 0).sum(-1)  # [..., s]
    to_t, from_s = (v.reshape(*batch, blocks, 1, block) for v in (to_t, from_s))
    starts = range(0, padded, block)
    inside = jnp.stack([x[..., i : i + block, i : i + block] for i in starts], axis=-3)
    u = jnp.arange(block)
    s_before, t_after = u < u[:, None], u >= u[:, None]  # [u, s], [u, t]

    total = around[..., None]
    total += jnp.where(t_after, to_t, 0).sum(-1) + jnp.where(s_before, from_s, 0).sum(-1)
    seen = s_before[:, :, None] & t_after[:, None, :]
    total += jnp.where(seen, inside[..., None, :, :], 0).sum((-2, -1))
    return total.reshape(*batch, padded)[..., :length]


def heads_first(x: Array) -> Array:
    """Return x [N, Q, R, ...] as [N, R, Q, ...]."""
    return jnp.moveaxis(x, 2, 1)


def tokens_first(x: Array) -> Array:
    """Return x [N, R, Q, ...] as [N, Q, R, ...]."""
    return jnp.moveaxis(x, 1, 2)
