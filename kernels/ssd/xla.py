"""State-space duality in plain XLA: matrix products inside chunks, with a hand-written gradient.

Inside a chunk of Q tokens (arXiv 2405.21060, section 6) the tokens act on each other as in
attention, through the Q x Q matrix C B^T times decays, and on later chunks through the state. A
`jax.lax.scan` walks over spans of a few chunks, which share batched products that are large enough
to keep the device busy. The forward pass keeps the state at the start of each chunk; the backward
pass walks back and recomputes the Q x Q matrices of one span at a time, so neither pass holds them
for the whole length.

The heads of a group, which share B and C, are processed together: inside this file the batch has
size N = B G with R = H / G heads, and states are [N, S, R, P], the heads of a group the columns of
one matrix. Where the chunks of a span do not interact they are part of the batch, of size M = N
times the chunks of a span. Einsum letters: n batch, t and s tokens of a chunk, r head, p channel of
a head, k number in a state. Each result has the order in which a batched matrix product yields it.
"""

from functools import reduce
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
from kernels.ssd.decays import (
    decays,
    decays_backward,
    heads_first,
    number_documents,
    tokens_first,
)

# A chunk of Q tokens costs Q P products per token and head next to the state's 2 P S, so 64 does
# less work than 128; it is the fastest of 32, 64 and 128 on a CPU. Matrix units are 128 wide.
_CHUNK_CPU, _CHUNK = 64, 128
# Size of a span's Q x Q matrices of all heads in float32: a CPU's cache, or on an accelerator
# little compared with the activations, but enough to occupy all of it.
_SPAN_BYTES_CPU, _SPAN_BYTES = 2**18, 2**26


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
        document = number_documents(segment_ids, chunk, length + tail)
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
        within, before, after = decays(delta, A_of, document)
        inputs = x * delta[..., None]
        written = product("nsk,nsrp->nkrp", B, after[..., None] * inputs)
        h_next, starts = _pass_on(h, before[:, -1], written, span)
        weights = within * product("ntk,nsk->nts", C, B)[:, None]
        y_span = tokens_first(product("nrts,nsrp->nrtp", weights, inputs))
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
        within, before, after = decays(delta, A_of, document, s_first=True)
        inputs = x * delta[..., None]

        # Tokens on tokens.
        scores = product("nsk,ntk->nst", B, C)[:, None]
        dy_by_head = heads_first(dy)
        dweights = product("nrsp,nrtp->nrst", heads_first(inputs), dy_by_head)
        dinputs = tokens_first(product("nrst,nrtp->nrsp", within * scores, dy_by_head))
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

        ddelta, dA_span = decays_backward(
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


def _columns(x: Array) -> Array:
    """Return x [..., R, P] as [..., R P]."""
    return x.reshape(*x.shape[:-2], -1)


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
