"""State-space duality in plain XLA: matrix products inside chunks, with a hand-written gradient.

Inside a chunk of Q tokens (arXiv 2405.21060, section 6) the tokens act on each other as in
attention, through the Q x Q matrix C B^T times decays, and on later chunks through the state. A
`jax.lax.scan` walks over spans of a few chunks, which share batched products that are large enough
to keep the device busy. The forward pass keeps the state at the start of each chunk; the backward
pass walks back and recomputes the Q x Q matrices of one span at a time, so neither pass holds them
for the whole length.

Exponents are differences of sums of the tokens' log-decays. A sum runs over the token's own
document only, as a product with zeros and ones: no document affects another, not even by rounding.
So that differences of large sums stay exact, each log-decay is split into a multiple of 2**-10, of
which all sums are exact in float32, and a rest so small that the rounding of its sums does not
matter. Where a decay is zero the exponent is minus infinity, set before the exponential.

The heads of a group, which share B and C, are processed together: inside this file the batch has
size N = B G with R = H / G heads, and states are [N, S, R, P], the heads of a group the columns of
one matrix. Where the chunks of a span do not interact they are part of the batch, of size M = N
times the chunks of a span. Einsum letters: n batch, t and s tokens of a chunk, r head, p channel of
a head, k number in a state. Each result has the order in which a batched matrix product yields it.
"""

from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.backends import target_platform
from kernels.custom_vjp import custom_vjp
from kernels.manual_axes import vary_alike
from kernels.precision import product_precision
from kernels.scan_inputs import ScanInputs, float32_or_zeros, time_steps

# A chunk of Q tokens costs Q P products per token and head next to the state's 2 P S, so 64 does
# less work than 128; it is the fastest of 32, 64 and 128 on a CPU. Matrix units are 128 wide.
_CHUNK_CPU, _CHUNK = 64, 128
# Size of a span's Q x Q matrices of all heads in float32: a CPU's cache, or on an accelerator
# little compared with the activations, but enough to occupy all of it.
_SPAN_BYTES_CPU, _SPAN_BYTES = 2**18, 2**26
# Lower log-decays are equivalent to minus infinity: exp(-128) is 0 in float32. A chunk's sum of
# multiples of 2**-10 down to it has 24 bits.
_LEAST_EXPONENT, _GRID = -128.0, 2.0**-10
# Tokens that `_sum_across` sums over pair by pair.
_BLOCK = 8


class _Tokens(NamedTuple):
    """Per-token arrays: of all tokens [N, L, ...] or of a span [M, Q, ...]."""

    x: Array  # [..., R, P], any float dtype
    delta: Array  # [..., R], float32
    B: Array  # [..., S], any float dtype
    C: Array  # [..., S], any float dtype
    document: Array | None  # [...], int32: 0, 1, ... from each chunk's start. None: always 0


def ssd(inputs: ScanInputs) -> tuple[Array, Array]:
    """Return (y, final state), as `kernels.ssd.ssd` does."""
    x, segment_ids = inputs.x, inputs.segment_ids
    batch, length, heads, size = x.shape
    groups, states = inputs.B.shape[2:]
    chunk = min(_CHUNK_CPU if target_platform() == "cpu" else _CHUNK, length)
    delta = time_steps(inputs.dt, inputs.dt_bias)

    span = _span(chunk, -(-length // chunk), batch * heads)
    # The last span is filled up with tokens of delta 0: decay 1 and input 0 do not change a state.
    tail = -length % (chunk * span)

    def by_group(v: Array) -> Array:
        """Return v [B, L, H or G, ...] as [N, L + tail, R or 1, ...]."""
        v = jnp.pad(v, ((0, 0), (0, tail), *((0, 0),) * (v.ndim - 2)))
        v = v.reshape(batch, length + tail, groups, -1, *v.shape[3:])
        return jnp.moveaxis(v, 2, 1).reshape(batch * groups, length + tail, *v.shape[3:])

    def per_head(v: Array) -> Array:
        """Return v [H] as [N, R]."""
        return jnp.tile(v.reshape(groups, -1), (batch, 1))

    document = None
    if segment_ids is not None:
        starts = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(starts, ((0, 0), (1, tail))).reshape(batch, -1, chunk)
        document = starts.cumsum(-1, dtype=jnp.int32).reshape(batch, -1)
        document = jnp.repeat(document, groups, axis=0)
    B, C = (by_group(v)[:, :, 0] for v in (inputs.B, inputs.C))
    tokens = _Tokens(by_group(x), by_group(delta), B, C, document)
    A, D = per_head(inputs.A.astype(jnp.float32)), per_head(float32_or_zeros(inputs.D, (heads,)))
    state_shape = batch, heads, size, states
    h0 = float32_or_zeros(inputs.initial_state, state_shape)
    h0 = jnp.moveaxis(h0.reshape(batch * groups, -1, size, states), 3, 1)
    y, h = _spans(chunk, span, *vary_alike((tokens, A, D, h0)))

    y = y[:, :length].reshape(batch, groups, length, -1, size)
    y = jnp.moveaxis(y, 1, 2).reshape(x.shape)
    return y, jnp.moveaxis(h, 1, 3).reshape(state_shape)


def _span(chunk: int, chunks: int, matrices: int) -> int:
    """Return how many chunks make a span, given the number of Q x Q matrices per chunk."""
    budget = _SPAN_BYTES_CPU if target_platform() == "cpu" else _SPAN_BYTES
    largest = max(1, budget // (4 * chunk * chunk * matrices))
    spans = -(-chunks // largest)
    return -(-chunks // spans)


@custom_vjp(nondiff_argnums=(0, 1))
def _spans(
    chunk: int, span: int, tokens: _Tokens, A: Array, D: Array, h0: Array
) -> tuple[Array, Array]:
    """Return y [N, L, R, P] in x's dtype and the last state [N, S, R, P] in float32."""
    return _spans_forward(chunk, span, tokens, A, D, h0)[0]


def _spans_forward(chunk: int, span: int, tokens: _Tokens, A: Array, D: Array, h0: Array):
    """Return the results, and the arguments with the state before each chunk in place of h0."""
    product = _product(tokens.x.dtype)
    A_of, D_of = (jnp.repeat(v, span, axis=0) for v in (A, D))  # [M, R]

    def step(carry, i):
        h, y = carry
        x, delta, B, C, document = _read(tokens, i, chunk, span)
        within, before, after = _decays(delta, A_of, document)
        inputs = x * delta[..., None]
        written = product("nsk,nsrp->nkrp", B, after[..., None] * inputs)
        h_next, starts = _pass_on(h, before[:, -1], written, span)
        weights = within * product("ntk,nsk->nts", C, B)[:, None]
        y_span = _tokens_first(product("nrts,nsrp->nrtp", weights, inputs))
        y_span += before[..., None] * product("ntk,nkrp->ntrp", C, starts)
        y_span += D_of[:, None, :, None] * x
        return (h_next, _write(y, i, y_span, span)), starts

    carry = h0, jnp.zeros_like(tokens.x)
    (h, y), starts = lax.scan(step, carry, jnp.arange(tokens.x.shape[1] // (chunk * span)))
    return (y, h), (tokens, A, D, starts)


def _spans_backward(chunk: int, span: int, residuals, cotangents):
    tokens, A, D, starts = residuals
    dy_all, dh_last = cotangents
    product = _product(tokens.x.dtype)
    A_of, D_of = (jnp.repeat(v, span, axis=0) for v in (A, D))  # [M, R]

    def step(carry, span_starts):
        dh_after, dA, dD, gradients = carry
        i, h = span_starts
        x, delta, B, C, document = _read(tokens, i, chunk, span)
        dy = _read(dy_all, i, chunk, span)
        within, before, after = _decays(delta, A_of, document, s_first=True)
        inputs = x * delta[..., None]

        # Tokens on tokens.
        scores = product("nsk,ntk->nst", B, C)[:, None]
        dy_by_head = _heads_first(dy)
        dweights = product("nrsp,nrtp->nrst", _heads_first(inputs), dy_by_head)
        dinputs = _tokens_first(product("nrst,nrtp->nrsp", within * scores, dy_by_head))
        dscores = _sum_heads(dweights * within)
        # The chunk's start on tokens and on its end.
        dread = before[..., None] * dy
        read = product("ntk,ntrp->nkrp", C, dread)
        dh_before, dh = _pass_on(dh_after, before[:, -1], read, span, backwards=True)
        dbefore = (product("ntk,nkrp->ntrp", C, h) * dy).sum(-1)
        dbefore = _add_last(dbefore, (dh * h).sum((1, 3)))
        dC = product("nti,nki->ntk", _columns(dread), _columns(h))
        dC += product("nst,nsk->ntk", dscores, B)
        # Tokens on the chunk's end.
        dwritten = product("nsk,nkrp->nsrp", B, dh)
        dafter = (dwritten * inputs).sum(-1)
        dinputs += after[..., None] * dwritten
        dB = product("nsi,nki->nsk", _columns(after[..., None] * inputs), _columns(dh))
        dB += product("nst,ntk->nsk", dscores, C)

        ddelta, dA_span = _decays_backward(
            delta, A_of, dweights * scores * within, dbefore * before, dafter * after
        )
        of_span = _Tokens(
            x=dinputs * delta[..., None] + D_of[:, None, :, None] * dy,
            delta=ddelta + (dinputs * x).sum(-1),
            B=dB,
            C=dC,
            document=None,
        )
        gradients = jax.tree.map(lambda g, part: _write(g, i, part, span), gradients, of_span)
        dA, dD = (
            total + part.reshape(-1, span, part.shape[1]).sum(1)
            for total, part in ((dA, dA_span), (dD, (dy * x).sum((1, 3))))
        )
        return (dh_before, dA, dD, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, tokens._replace(document=None))
    (dh, dA, dD, gradients), _ = lax.scan(
        step,
        (dh_last, jnp.zeros_like(A), jnp.zeros_like(D), zeros),
        (jnp.arange(starts.shape[0]), starts),
        reverse=True,
    )
    return gradients, dA, dD, dh


_spans.defvjp(_spans_forward, _spans_backward)


def _pass_on(
    h: Array, kept: Array, added: Array, span: int, *, backwards: bool = False
) -> tuple[Array, Array]:
    """Return the state after a span's chunks, and the states before each, [M, S, R, P].

    Args:
      h: the state before the span, [N, S, R, P].
      kept: the factor by which each chunk decays it, [M, R].
      added: what each chunk adds, [M, S, R, P].
      span: the number of chunks.
      backwards: whether to go from the last chunk to the first; "before" is then "after".
    """
    kept = kept.reshape(-1, span, 1, kept.shape[1], 1)
    added = added.reshape(-1, span, *added.shape[1:])
    states = []
    for c in range(span)[:: -1 if backwards else 1]:
        states.append(h)
        h = kept[:, c] * h + added[:, c]
    before = jnp.stack(states[:: -1 if backwards else 1], axis=1)
    return h, before.reshape(-1, *before.shape[2:])


def _decays(
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
    batch, length, _ = delta.shape
    seen = jnp.tril(jnp.ones((length, length), bool))[None]  # (t, s)
    if document is not None:
        seen &= document[:, :, None] == document[:, None, :]
    exponents = jnp.maximum(delta * A[:, None], _LEAST_EXPONENT)
    coarse = lax.stop_gradient(jnp.round(exponents / _GRID) * _GRID)
    # Over a document's tokens of the chunk up to t, as exact as float32 on every device.
    ones = jnp.broadcast_to(seen, (batch, length, length)).astype(jnp.float32)
    total = partial(jnp.einsum, "nts,nsr->ntr", ones, precision=lax.Precision.HIGHEST)
    sums = total(coarse), total(exponents - coarse)

    def differences(sums: Array) -> Array:
        at_t, at_s = sums[..., :, None], sums[..., None, :]  # [N, R, t, s]
        return at_t.mT - at_s.mT if s_first else at_t - at_s

    seen = (seen.mT if s_first else seen)[:, None]
    exponents = sum(differences(_heads_first(v)) for v in sums)
    within = jnp.exp(jnp.where(seen, exponents, -jnp.inf))
    before, after = sum(sums), sum(v[:, -1:] - v for v in sums)
    if document is not None:
        before = jnp.where(document[..., None] == 0, before, -jnp.inf)
        after = jnp.where((document == document[:, -1:])[..., None], after, -jnp.inf)
    return within, jnp.exp(before), jnp.exp(after)


def _decays_backward(
    delta: Array, A: Array, of_within: Array, of_before: Array, of_after: Array
) -> tuple[Array, Array]:
    """Return the gradients of delta [N, Q, R] and A [N, R].

    The log-decay of token u is a term of the exponent of each pair s < u <= t, of each decay from
    the start to t >= u and of each decay to the end from t < u. The sums below have these terms and
    no others. Autodiff of `_decays` would compute them as differences of whole sums over t and s,
    which lose all digits under strong decay: a token's own pair s = t, whose weight is 1, is part
    of both.

    Args:
      delta: as in `_decays`.
      A: as in `_decays`.
      of_within: gradient of the exponents of pairs, [N, R, Q, Q] (s, t), 0 for pairs that are not
        seen.
      of_before: gradient of the exponents from the chunk's start to t, [N, Q, R].
      of_after: gradient of the exponents from t to the chunk's end, [N, Q, R].
    """
    of_pairs = _sum_across(of_within)
    of_starts = lax.cumsum(of_before, axis=1, reverse=True)
    of_ends = jnp.pad(lax.cumsum(of_after, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    dexponents = _tokens_first(of_pairs) + of_starts + of_ends
    dexponents = jnp.where(delta * A[:, None] > _LEAST_EXPONENT, dexponents, 0)
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


def _product(dtype: jnp.dtype):
    """Return an einsum of float32 arrays that rounds them to a dtype and accumulates in float32."""
    if target_platform() == "cpu":  # no matrix units; its products of bfloat16 are incomplete
        dtype = jnp.float32

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(
            equation,
            a.astype(dtype),
            b.astype(dtype),
            precision=product_precision(dtype),
            preferred_element_type=jnp.float32,
        )

    return product


def _sum_heads(x: Array) -> Array:
    """Return the sum of x [N, R, ...] over R; XLA's reduction takes ten times as long on a CPU."""
    return reduce(add, jnp.unstack(x, axis=1))


def _heads_first(x: Array) -> Array:
    """Return x [N, Q, R, ...] as [N, R, Q, ...]."""
    return jnp.moveaxis(x, 2, 1)


def _columns(x: Array) -> Array:
    """Return x [..., R, P] as [..., R P]."""
    return x.reshape(*x.shape[:-2], -1)


def _tokens_first(x: Array) -> Array:
    """Return x [N, R, Q, ...] as [N, Q, R, ...]."""
    return jnp.moveaxis(x, 1, 2)


def _add_last(x: Array, update: Array) -> Array:
    """Return x with the update added to x[:, -1]: elementwise, so that it fuses with its users."""
    is_last = lax.broadcasted_iota(jnp.int32, x.shape, 1) == x.shape[1] - 1
    return jnp.where(is_last, x + update[:, None], x)


def _read(tree, i: Array, chunk: int, span: int):
    """Return span i of arrays [N, L, ...] as [M, Q, ...], floats in float32."""

    def read(v):
        v = lax.dynamic_slice_in_dim(v, i * chunk * span, chunk * span, axis=1)
        v = v.reshape(-1, chunk, *v.shape[2:])
        return v.astype(jnp.float32) if jnp.issubdtype(v.dtype, jnp.floating) else v

    return jax.tree.map(read, tree)


def _write(whole: Array, i: Array, part: Array, span: int) -> Array:
    """Write span i, [M, Q, ...], into its place in [N, L, ...]."""
    tokens = span * part.shape[1]
    part = part.reshape(-1, tokens, *part.shape[2:]).astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, part, i * tokens, axis=1)
