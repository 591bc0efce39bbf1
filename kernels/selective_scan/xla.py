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
    reset: Array | None  # [...], float32: -inf where the state is reset, else 0. None: never reset


class _Form(NamedTuple):
    """One way to do the work inside a chunk of T tokens."""

    chunk: int  # the T of a long sequence
    outputs: Callable  # (state before [B, S, E], A, tokens) -> (last state, y [T, B, E])
    states: Callable  # (decay, x [T, B, E], B, h0) -> states before, after tokens [T, B, S, E]
    adjoints: Callable  # (decay, dy [T, B, E], C, dh) -> gradients of the states after tokens


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
    reset = None
    if segment_ids is not None:
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        reset = jnp.pad(jnp.where(same, 0.0, -jnp.inf).astype(f32), ((0, 0), (1, tail)))
    padding = (0, 0), (0, tail), (0, 0)
    u_all, delta, B, C = (jnp.pad(x, padding) for x in (u, delta, inputs.B, inputs.C))
    tokens = _Tokens(u_all, delta, B, C, reset)
    y, state = _scan(form, *vary_alike((tokens, A.astype(f32).T, h0.mT)))

    y = y[:, :length] + float32_or_zeros(inputs.D, u.shape[2:]) * u.astype(f32)
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return y.astype(u.dtype), state.mT


@custom_vjp(nondiff_argnums=(0,))
def _scan(form: str, tokens: _Tokens, A: Array, h0: Array) -> tuple[Array, Array]:
    """Return y [B, L, E] and the last state [B, S, E], both float32.

    h_t = exp(delta_t A + reset_t) h_{t-1} + delta_t u_t B_t and y_t = sum over S of C_t h_t.
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
        u, delta, B, C, reset = _read(tokens, i, chunk)
        dy = _read(dy_all, i, chunk)
        x = delta * u
        decay = _decay(delta, A, reset)
        before, h = _FORMS[form].states(decay, x, B, h0)
        dh = _FORMS[form].adjoints(decay, dy, C, dh)
        dx = _einsum("tbse,tbs->tbe", dh, B)
        exponent = decay * dh * before  # the gradient of delta * A
        # XLA's CPU backend would copy the operands of these two sums if they were reductions.
        ddelta = dx * u + reduce(add, (exponent[:, :, s] * A[s] for s in range(A.shape[0])))
        dA = dA + reduce(add, (exponent[t] * delta[t, :, None] for t in range(chunk)))
        of_chunk = _Tokens(
            u=dx * delta,
            delta=ddelta,
            B=_einsum("tbse,tbe->tbs", dh, x),
            C=_einsum("tbse,tbe->tbs", h, dy),
            reset=None,
        )
        gradients = jax.tree.map(lambda g, part: _write(g, i, part), gradients, of_chunk)
        return (decay[0] * dh[0], dA, gradients), None

    zeros = jax.tree.map(jnp.zeros_like, tokens._replace(reset=None))
    (dh, dA, gradients), _ = lax.scan(
        step,
        (dh_last, jnp.zeros_like(dh_last), zeros),
        (jnp.arange(length // chunk), starts),
        reverse=True,
    )
    return gradients, dA.sum(0), dh


_scan.defvjp(_scan_forward, _scan_backward)


def _decay(delta: Array, A: Array, reset: Array | None) -> Array:
    """Return exp(delta A) [..., S, E], 0 where the state is reset; delta [..., E], reset [...].

    The reset is part of the exponent: as a factor XLA would multiply by it in every use.
    """
    exponent = delta[..., None, :] * A
    return jnp.exp(exponent if reset is None else exponent + reset[..., None, None])


def _outputs_sequential(h: Array, A: Array, tokens: _Tokens) -> tuple[Array, Array]:
    def step(h, token):
        u, delta, B, C, reset = token
        h = _decay(delta, A, reset) * h + _outer(delta * u, B)
        return h, _einsum("bse,bs->be", h, C)

    return lax.scan(step, h, tokens)


def _states_sequential(decay: Array, x: Array, B: Array, h0: Array) -> tuple[Array, Array]:
    def step(t, h):  # in place: an output stacked by lax.scan would be written twice
        h_t = _at(decay, t) * _at(h, t) + _outer(_at(x, t), _at(B, t))
        return lax.dynamic_update_index_in_dim(h, h_t, t + 1, 0)

    h = jnp.zeros((len(x) + 1, *h0.shape), h0.dtype).at[0].set(h0)
    h = lax.fori_loop(0, len(x), step, h)
    return h[:-1], h[1:]


def _adjoints_sequential(decay: Array, dy: Array, C: Array, dh: Array) -> Array:
    def step(i, carry):
        g, dh = carry
        t = len(dy) - 1 - i
        g_t = dh + _outer(_at(dy, t), _at(C, t))
        return lax.dynamic_update_index_in_dim(g, g_t, t, 0), _at(decay, t) * g_t

    return lax.fori_loop(0, len(dy), step, (jnp.zeros_like(decay), dh))[0]


def _outputs_associative(h: Array, A: Array, tokens: _Tokens) -> tuple[Array, Array]:
    u, delta, B, C, reset = tokens
    h = _states_associative(_decay(delta, A, reset), delta * u, B, h)[1]
    return h[-1], _einsum("tbse,tbs->tbe", h, C)


def _states_associative(decay: Array, x: Array, B: Array, h0: Array) -> tuple[Array, Array]:
    inputs = _add_at(_outer(x, B), 0, decay[0] * h0)
    h = lax.associative_scan(_compose, (decay, inputs))[1]
    return jnp.concatenate([h0[None], h[:-1]]), h


def _adjoints_associative(decay: Array, dy: Array, C: Array, dh: Array) -> Array:
    after = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
    inputs = _add_at(_outer(dy, C), len(dy) - 1, dh)
    return lax.associative_scan(_compose, (after, inputs), reverse=True)[1]


def _compose(first, second):
    """Return the map h -> a h + b of two consecutive steps; each map is a pair (a, b)."""
    return second[0] * first[0], second[0] * first[1] + second[1]


_FORMS = {
    "sequential": _Form(16, _outputs_sequential, _states_sequential, _adjoints_sequential),
    "associative": _Form(64, _outputs_associative, _states_associative, _adjoints_associative),
}


def _outer(of_channels: Array, of_states: Array) -> Array:
    """Return the products [..., S, E] of arrays [..., E] and [..., S]."""
    return of_channels[..., None, :] * of_states[..., None]


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
