"""The selective scan's Pallas kernels for TPUs: the work on one chunk of one tile of channels.

The state of a tile is in registers as [S sublanes, channels in lanes] and advances from token to
token; between chunks it stays in VMEM. Tokens are processed in groups of 16, the rows of a bfloat16
register: Mosaic reads and writes such a group as a whole, and its 16 steps are unrolled.

The backward kernel gets the chunks in reverse. It runs a chunk forward from its saved start, keeps
the state before each token in VMEM, and then walks back through them.

Sizes in this file: T tokens of a chunk, W channels of a tile, S states.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GROUP = 16  # tokens
LANES = 128
SUBLANES = 8

_LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """What both kernels read, as references to blocks in VMEM or as arrays."""

    u: Any  # [T, W], bfloat16 or float32
    dt: Any  # [T, W], bfloat16 or float32
    z: Any  # [T, W], bfloat16 or float32; None: no gate
    B: Any  # [S, 128], float32, token t of the chunk in lane t
    C: Any  # like B
    A: Any  # [S, W], float32
    D: Any  # [1, W], float32
    dt_bias: Any  # [1, W], float32
    resets: Any  # [1, T], int32, in SMEM: 1 where h_{t-1} counts as zero; None: nowhere


class Gradients(NamedTuple):
    """Blocks that the backward kernel writes."""

    u: Any  # [T, W], in u's dtype
    dt: Any  # [T, W], in dt's dtype
    z: Any  # [T, W], in z's dtype; None: no gate
    B: Any  # [1, T * S], float32, this tile's part of the sum over channels, token by token
    C: Any  # like B
    A: Any  # [S, W], float32, summed over the chunks, as are the next three
    D: Any  # [1, W]
    dt_bias: Any  # [1, W]
    initial_state: Any  # [S, W]; between chunks, the running gradient of the state


class Scratch(NamedTuple):
    """VMEM of the backward kernel, all float32."""

    states: Any  # [T + 1, S, W]: before token t, and after the last
    B: Any  # [T * S, 128]: the products whose sum over lanes is the gradient of B
    C: Any  # like B


class _Group(NamedTuple):
    """A group's tokens in float32, [16, channels]; zeros past the end of the sequence."""

    u: Array
    delta: Array
    slope: Array  # of the softplus
    x: Array  # delta * u
    gate: Array | None  # silu(z)
    gate_slope: Array | None  # its derivative


class _StateSums:
    """Sums over the states of a group's 16 arrays [S, channels], as the rows of [16, channels].

    Sublanes are summed for eight arrays at a time. Two arrays with partial sums in all sublanes are
    combined into one that alternates between sums of the first and of the second; after three such
    steps each array has one sublane left, its own. That takes 7 rotations; summing them separately
    takes 24. Arrays arrive one by one, in ascending or descending order, so that few wait in
    registers.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Array] = {}  # by the step they wait for
        self._sums: dict[int, Array] = {}

    def add(self, j: int, x: Array) -> None:
        """Add the array of token j."""
        folded: Any = sum(x[i : i + SUBLANES] for i in range(0, len(x), SUBLANES))
        place = lax.broadcasted_iota(jnp.int32, folded.shape, 0)
        for distance in (1, 2, 4):
            if distance not in self._waiting:
                self._waiting[distance] = folded
                return
            pair = self._waiting.pop(distance), folded
            even, odd = pair[::-1] if j & distance == 0 else pair
            first = (place & distance) == 0
            other = pltpu.roll(jnp.where(first, odd, even), distance, axis=0)
            folded = jnp.where(first, even, odd) + other
        self._sums[j // SUBLANES] = folded

    def rows(self) -> Array:
        """Return the sums, after all arrays were added."""
        return jnp.concatenate([self._sums[i] for i in range(GROUP // SUBLANES)])


def forward(
    inputs: Inputs,
    initial_state: Any,
    y: Any,
    final_state: Any,
    starts: Any,
    *,
    length: int,
) -> None:
    """Write y [T, W]; final_state [S, W] is the running state, `starts` [S, W] a copy at the start.

    `length` is that of the sequence; the last chunk may hold fewer than T of its tokens.
    """
    chunk = pl.program_id(2)

    @pl.when(chunk == 0)
    def _() -> None:
        final_state[...] = initial_state[...]

    if starts is not None:
        starts[...] = final_state[...]
    A = inputs.A[...] * _LOG2_E
    D = inputs.D[...]

    def step(i: Any, h: Array) -> Array:
        group = _read(inputs, i, _valid(inputs, chunk, i, length))
        B, C = _columns(inputs.B, i), _columns(inputs.C, i)
        y_sums = _StateSums()
        for j in range(GROUP):
            h = _unless_reset(inputs, i, j, h)
            h = jnp.exp2(_row(group.delta, j) * A) * h + _row(group.x, j) * _column(B, j)
            y_sums.add(j, h * _column(C, j))
        out = y_sums.rows() + D * group.u
        if group.gate is not None:
            out = out * group.gate
        y[_rows(i), :] = out.astype(y.dtype)
        return h

    groups = _groups(inputs, chunk, length)
    final_state[...] = lax.fori_loop(0, groups, step, final_state[...])


def backward(
    inputs: Inputs,
    starts: Any,
    dy: Any,
    dh_final: Any,
    grads: Gradients,
    scratch: Scratch,
    *,
    length: int,
) -> None:
    """Write the gradients, given the state at the chunk's start [S, W] and dy [T, W].

    `dh_final` [S, W] is the gradient of the state after the last token.
    """
    step_of_grid = pl.program_id(2)
    chunk = pl.num_programs(2) - 1 - step_of_grid

    @pl.when(step_of_grid == 0)
    def _() -> None:
        grads.initial_state[...] = dh_final[...]
        for ref in (grads.A, grads.D, grads.dt_bias):
            ref[...] = jnp.zeros_like(ref)

    groups = _groups(inputs, chunk, length)
    lax.fori_loop(0, groups, _recompute(inputs, scratch, chunk, length), starts[...])
    back = _step_back(inputs, dy, grads, scratch, chunk, length)
    sums = grads.initial_state, grads.A, grads.D, grads.dt_bias
    results = lax.fori_loop(
        0, groups, lambda i, carry: back(groups - 1 - i, carry), tuple(ref[...] for ref in sums)
    )
    for ref, result in zip(sums, results, strict=True):
        ref[...] = result
    grads.B[...] = _sum_lanes(scratch.B[...])
    grads.C[...] = _sum_lanes(scratch.C[...])


def _recompute(
    inputs: Inputs, scratch: Scratch, chunk: Any, length: int
) -> Callable[[Any, Array], Array]:
    """Return the step over one group that saves the state before each token."""
    A = inputs.A[...] * _LOG2_E

    def step(i: Any, h: Array) -> Array:
        group = _read(inputs, i, _valid(inputs, chunk, i, length))
        B = _columns(inputs.B, i)
        for j in range(GROUP):
            scratch.states[i * GROUP + j] = h
            h = _unless_reset(inputs, i, j, h)
            h = jnp.exp2(_row(group.delta, j) * A) * h + _row(group.x, j) * _column(B, j)
        scratch.states[(i + 1) * GROUP] = h
        return h

    return step


def _step_back(
    inputs: Inputs,
    dy: Any,
    grads: Gradients,
    scratch: Scratch,
    chunk: Any,
    length: int,
) -> Callable[[Any, tuple[Array, ...]], tuple[Array, ...]]:
    """Return the step back over one group.

    Its carry: the gradient of the state after the group, and those of A, D and dt_bias so far.
    """
    A = inputs.A[...]
    A_2 = A * _LOG2_E
    D = inputs.D[...]

    def step(i: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dh, dA, dD, d_bias = carry
        valid = _valid(inputs, chunk, i, length)
        group = _read(inputs, i, valid)
        dy_group = _load(dy, i, valid)
        dy_scan = dy_group if group.gate is None else dy_group * group.gate
        B, C = _columns(inputs.B, i), _columns(inputs.C, i)
        y_sums, dx_sums, d_delta_sums = (_StateSums() for _ in range(3))
        h = scratch.states[(i + 1) * GROUP]
        for j in reversed(range(GROUP)):
            delta, x, dy_row = _row(group.delta, j), _row(group.x, j), _row(dy_scan, j)
            decay = jnp.exp2(delta * A_2)
            before = scratch.states[i * GROUP + j]
            kept = decay * _unless_reset(inputs, i, j, before)
            dh = dh + dy_row * _column(C, j)
            _keep_products(scratch.B, i, j, dh * x)
            _keep_products(scratch.C, i, j, h * dy_row)
            y_sums.add(j, h * _column(C, j))
            dx_sums.add(j, dh * _column(B, j))
            exponent = dh * kept  # the gradient of delta * A
            d_delta_sums.add(j, exponent * A)
            dA = dA + exponent * delta
            dh = _unless_reset(inputs, i, j, dh * decay)
            h = before
        dx, d_delta = dx_sums.rows(), d_delta_sums.rows()
        d_dt = (d_delta + dx * group.u) * group.slope
        grads.u[_rows(i), :] = (dx * group.delta + D * dy_scan).astype(grads.u.dtype)
        grads.dt[_rows(i), :] = d_dt.astype(grads.dt.dtype)
        if group.gate is not None:
            dz = dy_group * (y_sums.rows() + D * group.u) * group.gate_slope
            grads.z[_rows(i), :] = dz.astype(grads.z.dtype)
        dD = dD + jnp.sum(dy_scan * group.u, axis=0, keepdims=True)
        d_bias = d_bias + jnp.sum(d_dt, axis=0, keepdims=True)
        return dh, dA, dD, d_bias

    return step


def _groups(inputs: Inputs, chunk: Any, length: int) -> Any:
    """Return how many groups of a chunk hold tokens."""
    tokens = inputs.u.shape[0]
    if length % tokens == 0:
        return tokens // GROUP
    left = jnp.minimum(tokens, length - chunk * tokens)
    return lax.div(left + GROUP - 1, GROUP)  # `//` would ask JAX for the device


def _rows(i: Any) -> Any:
    return pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP)


def _valid(inputs: Inputs, chunk: Any, i: Any, length: int) -> Array | None:
    """Return which tokens [16, 1] of group i are in the sequence; None if all are.

    Data past the end of the last block is arbitrary, not zero.
    """
    if length % GROUP == 0:
        return None
    first = chunk * inputs.u.shape[0] + i * GROUP
    return lax.broadcasted_iota(jnp.int32, (GROUP, 1), 0) < length - first


def _load(ref: Any, i: Any, valid: Array | None) -> Array:
    x = ref[_rows(i), :].astype(jnp.float32)
    return x if valid is None else jnp.where(valid, x, 0)


def _read(inputs: Inputs, i: Any, valid: Array | None) -> _Group:
    u = _load(inputs.u, i, valid)
    dt = _load(inputs.dt, i, valid) + inputs.dt_bias[...]
    delta = jnp.maximum(dt, 0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
    slope = jax.nn.sigmoid(dt)
    if valid is not None:  # a token with no time step does not change the state
        delta, slope = jnp.where(valid, delta, 0), jnp.where(valid, slope, 0)
    gate = gate_slope = None
    if inputs.z is not None:
        z = _load(inputs.z, i, valid)
        opening = jax.nn.sigmoid(z)
        gate = z * opening
        gate_slope = opening * (1 + z * (1 - opening))
    return _Group(u, delta, slope, delta * u, gate, gate_slope)


def _columns(ref: Any, i: Any) -> Array:
    """Bring the columns of group i to the first lanes, where each has a fixed place."""
    return pltpu.roll(ref[...], lax.rem(LANES - i * GROUP, LANES), axis=1)


def _column(x: Array, j: int) -> Array:
    return x[:, j : j + 1]


def _row(x: Array, j: int) -> Array:
    return x[j : j + 1, :]


def _unless_reset(inputs: Inputs, i: Any, j: int, h: Array) -> Array:
    """Return h, or zero where token j of group i begins a document; h may be infinite."""
    if inputs.resets is None:
        return h
    return jnp.where(inputs.resets[0, i * GROUP + j] != 0, 0.0, h)


def _keep_products(ref: Any, i: Any, j: int, x: Array) -> None:
    """Store x [S, W] of token j of group i, folded to 128 lanes, in its rows of `ref`."""
    states, channels = x.shape
    rows = pl.ds(pl.multiple_of((i * GROUP + j) * states, states), states)
    ref[rows, :] = sum(x[:, start : start + LANES] for start in range(0, channels, LANES))


def _sum_lanes(x: Array) -> Array:
    """Return the sums over the lanes of x [N, 128] as a row [1, N]."""
    return jnp.sum(x.T, axis=0, keepdims=True)
