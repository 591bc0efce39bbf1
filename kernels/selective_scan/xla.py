"""The selective scan in plain XLA: chunks of tokens, with a hand-written gradient.

The forward pass walks over the chunks and keeps the state at the start of each, [chunks, B, S, E].
The backward pass walks back over them and recomputes the states inside one chunk at a time, so
neither pass holds the states of the whole length.

Two forms of the work inside a chunk share everything else. 'sequential' loops over the tokens: the
least work, and fast where starting an operation is cheap (CPU). 'associative' uses
`jax.lax.associative_scan`: a few times the work, in few wide operations (accelerators).

Inside this file the inner width is the minor dimension (A [S, E], states [B, S, E]) and the arrays
of a chunk start with time ([T, B, ...]), so that every step reads and writes contiguous memory.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.custom_vjp import custom_vjp
from kernels.manual_axes import vary_alike
from kernels.scan_inputs import ScanInputs, float32_or_zeros, time_steps

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class _Tokens(NamedTuple):
    """Per-token arrays of the scan: of all tokens [B, L, ...] or of one chunk [T, B, ...]."""

    u: Array  # [..., E], any float dtype
    delta: Array  # [..., E], float32
    B: Array  # [..., S], any float dtype
    C: Array  # [..., S], any float dtype
    keep: Array | None  # [...], float32: 0 where the state is reset, else 1. None: never reset


class _Form(NamedTuple):
    """One way to do the work inside a chunk of T tokens."""

    chunk: int  # the T of a long sequence
    outputs: Callable  # (state before [B, S, E], A, tokens) -> (last state, y [T, B, E])
    states: Callable  # (decay, x [T, B, S, E], h0) -> h: h_t = decay_t h_{t-1} + x_t
    adjoints: Callable  # (decay, x, dh) -> g: g_t = decay_{t+1} g_{t+1} + x_t, + dh at the last


def selective_scan(inputs: ScanInputs, *, form: str) -> tuple[Array, Array]:
    """Return (y, final state), computed in the form 'sequential' or 'associative'.

    Results are those of `kernels.selective_scan.selective_scan`.
    """
    f32 = jnp.float32
    u, A, z, segment_ids = inputs.x, inputs.A, inputs.z, inputs.segment_ids
    length = u.shape[1]
    delta = time_steps(inputs.dt, inputs.dt_bias)
    h0 = float32_or_zeros(inputs.initial_state, (u.shape[0], *A.shape))

    # The last chunk is filled up with tokens of delta 0: decay 1 and input 0 do not change a state.
    tail = -length % min(_FORMS[form].chunk, length)
    keep = None
    if segment_ids is not None:
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        keep = jnp.pad(same.astype(f32), ((0, 0), (1, tail)), constant_values=1)
    padding = (0, 0), (0, tail), (0, 0)
    u_all, delta, B, C = (jnp.pad(x, padding) for x in (u, delta, inputs.B, inputs.C))
    tokens = _Tokens(u_all, delta, B, C, keep)
    y, state = _scan(form, *vary_alike((tokens, A.astype(f32).T, h0.mT)))

    y = y[:, :length] + float32_or_zeros(inputs.D, u.shape[2:]) * u.astype(f32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return y.astype(u.dtype), state.mT


@custom_vjp(nondiff_argnums=(0,))
def _scan(form: str, tokens: _Tokens, A: Array, h0: Array) -> tuple[Array, Array]:
    """Return y [B, L, E] and the last state [B, S, E], both float32.

    h_t = keep_t exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = sum over S of C_t h_t.
    """
    return _scan_forward(form, tokens, A, h0)[0]


def _scan_forward(form: str, tokens: _Tokens, A: Array, h0: Array):
    """Return the results, and the arguments with the state before each chunk in place of h0."""
    length = tokens.u.shape[1]
    chunk = min(_FORMS[form].chunk, length)

    def step(carry, i):
        h, y = carry
        h_next, y_chunk = _FORMS[form].outputs(h, A, _read(tokens, i, chunk))
        return (h_next, _write(y, i, y_chunk)), h

    carry = h0, jnp.zeros_like(tokens.delta)
    (h, y), starts = lax.scan(step, carry, jnp.arange(length // chunk))
    return (y, h), (tokens, A, starts)


def _scan_backward(form: str, residuals, cotangents):
    tokens, A, starts = residuals
    dy_all, dh_last = cotangents
    length = tokens.u.shape[1]
    chunk = min(_FORMS[form].chunk, length)

    def step(carry, chunk_start):
        dh, dA, gradients = carry
        i, h0 = chunk_start
        u, delta, B, C, keep = _read(tokens, i, chunk)
        dy = _read(dy_all, i, chunk)
        x = delta * u
        decay = _decay(delta, A, keep)
        h = _FORMS[form].states(decay, x[:, :, None] * B[..., None], h0)
        dh = _FORMS[form].adjoints(decay, dy[:, :, None] * C[..., None], dh)
        dx = _einsum("tbse,tbs->tbe", dh, B)
        dh_before = decay * dh
        exponent = dh_before * jnp.concatenate([h0[None], h[:-1]])  # the gradient of delta * A
        # XLA's CPU backend would copy the operands of these two sums if they were reductions.
        ddelta = dx * u + reduce(add, (exponent[:, :, s] * A[s] for s in range(A.shape[0])))
        dA = dA + reduce(add, (exponent[t] * delta[t, :, None] for t in range(chunk)))
        of_chunk = _Tokens(
            u=dx * delta,
            delta=ddelta,
            B=_einsum("tbse,tbe->tbs", dh, x),
            C=_einsum("tbse,tbe->tbs", h, dy),
            keep=None,
        )
        gradients = jax.tree.map(lambda g, part: _write(g, i, part), gradients, of_chunk)
        return (dh_before[0], dA, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, tokens._replace(keep=None))
    (dh, dA, gradients), _ = lax.scan(
        step,
        (dh_last, jnp.zeros_like(dh_last), zeros),
        (jnp.arange(length // chunk), starts),
        reverse=True,
    )
    return gradients, dA.sum(0), dh


_scan.defvjp(_scan_forward, _scan_backward)


def _decay(delta: Array, A: Array, keep: Array | None) -> Array:
    """Return exp(delta A) [..., S, E], 0 where the state is reset; delta [..., E], keep [...]."""
    decay = jnp.exp(delta[..., None, :] * A)
    return decay if keep is None else decay * keep[..., None, None]


def _outputs_sequential(h: Array, A: Array, tokens: _Tokens) -> tuple[Array, Array]:
    def step(h, token):
        u, delta, B, C, keep = token
        h = _decay(delta, A, keep) * h + (delta * u)[:, None] * B[..., None]
        return h, _einsum("bse,bs->be", h, C)

    return lax.scan(step, h, tokens)


def _states_sequential(decay: Array, x: Array, h0: Array) -> Array:
    def step(t, h):  # in place: an output stacked by lax.scan would be written twice
        h_t = _at(decay, t) * _at(h, t - 1) + _at(h, t)
        return lax.dynamic_update_index_in_dim(h, h_t, t, 0)

    return lax.fori_loop(1, x.shape[0], step, _add_at(x, 0, decay[0] * h0))


def _adjoints_sequential(decay: Array, x: Array, dh: Array) -> Array:
    last = x.shape[0] - 1

    def step(i, g):
        t = last - i
        g_t = _at(decay, t + 1) * _at(g, t + 1) + _at(g, t)
        return lax.dynamic_update_index_in_dim(g, g_t, t, 0)

    return lax.fori_loop(1, last + 1, step, _add_at(x, last, dh))


def _outputs_associative(h: Array, A: Array, tokens: _Tokens) -> tuple[Array, Array]:
    u, delta, B, C, keep = tokens
    x = (delta * u)[:, :, None] * B[..., None]
    h = _states_associative(_decay(delta, A, keep), x, h)
    return h[-1], _einsum("tbse,tbs->tbe", h, C)


def _states_associative(decay: Array, x: Array, h0: Array) -> Array:
    return lax.associative_scan(_compose, (decay, _add_at(x, 0, decay[0] * h0)))[1]


def _adjoints_associative(decay: Array, x: Array, dh: Array) -> Array:
    after = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
    return lax.associative_scan(_compose, (after, _add_at(x, x.shape[0] - 1, dh)), reverse=True)[1]


def _compose(first, second):
    """Return the map h -> a h + b of two consecutive steps; each map is a pair (a, b)."""
    return second[0] * first[0], second[0] * first[1] + second[1]


_FORMS = {
    "sequential": _Form(16, _outputs_sequential, _states_sequential, _adjoints_sequential),
    "associative": _Form(64, _outputs_associative, _states_associative, _adjoints_associative),
}


def _at(x: Array, t: Array) -> Array:
    return lax.dynamic_index_in_dim(x, t, 0, keepdims=False)


def _add_at(x: Array, t: int, update: Array) -> Array:
    """Return x with the update added to x[t]: elementwise, so that it fuses with x's producer."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) == t, x + update, x)


def _read(tree, i: Array, chunk: int):
    """Return chunk i of arrays [B, L, ...], time first and in float32: [chunk, B, ...]."""

    def read(x):
        x = lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        return jnp.moveaxis(x, 1, 0).astype(jnp.float32)

    return jax.tree.map(read, tree)


def _write(whole: Array, i: Array, part: Array) -> Array:
    """Write chunk i, [T, B, ...], into its place in [B, L, ...]."""
    part = jnp.moveaxis(part, 0, 1).astype(whole.dtype)
    return lax.dynamic_update_slice_in_dim(whole, part, i * part.shape[1], axis=1)
