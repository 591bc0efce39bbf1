"""The selective scan's Pallas kernels for TPUs: the work on one chunk of one tile of channels.

The state of a tile is in registers as [S sublanes, channels in lanes] and advances from token to
token; between chunks it stays in VMEM. Tokens are processed in groups of 16, the rows of a bfloat16
register: Mosaic reads and writes such a group as a whole, and its 16 steps are unrolled.

The backward kernel gets the chunks in reverse. It runs a chunk forward from its saved start, keeps
the state before each token in VMEM, and then walks back through them.

Arithmetic limits both kernels, so whatever VMEM can do instead is left to it: loads repeat a
token's row over the sublanes and sort partial sums by token (`_StateSums`). The tiles of a part
share a chunk's columns of B and C, which are repeated over the lanes once, and the sums over lanes
for their gradients.

Sizes in this file: T tokens of a chunk, W channels of a tile, P channels of a part, S states.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

GROUP = 16  # tokens
LANES = 128
SUBLANES = 8
SUM_ROWS = GROUP * (SUBLANES + 1)  # of _StateSums

LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
    """What both kernels read, as references to blocks in VMEM or as arrays."""

    u: Any  # [T, W], bfloat16 or float32
    dt: Any  # [T, W], bfloat16 or float32
    z: Any  # [T, W], bfloat16 or float32; None: no gate
    B: Any  # [S, 128], float32, token t of the chunk in lane t
    C: Any  # like B
    A: Any  # [S, P], float32; for the kernels, times log2(e)
    D: Any  # [1, P], float32
    dt_bias: Any  # [1, P], float32
    resets: Any  # [1, T / 16], int32, in SMEM: bit j of a group is 1 if h_{t-1} counts as zero


class Results(NamedTuple):
    """Blocks that the forward kernel writes."""

    y: Any  # [T, W], in u's dtype
    final_state: Any  # [S, P], float32; between chunks, the running state
    starts: Any  # [S, W], float32, the state at the chunk's start; None: not kept


class Gradients(NamedTuple):
    """Blocks that the backward kernel writes."""

    u: Any  # [T, W], in u's dtype
    dt: Any  # [T, W], in dt's dtype
    z: Any  # [T, W], in z's dtype; None: no gate
    B: Any  # [S, 128], float32, the sum over the part's channels, token t in lane t
    C: Any  # like B
    A: Any  # [S, P], float32, summed over the chunks, as are the next three
    D: Any  # [8, P], whose rows are still to be summed
    dt_bias: Any  # like D
    initial_state: Any  # [S, P]; between chunks, the running gradient of the state


class ForwardScratch(NamedTuple):
    """VMEM of the forward kernel, all float32, with W split into [W / 128] and 128."""

    B: Any  # [T, S, 128]: the column of each token, repeated over all lanes
    C: Any  # like B
    delta: Any  # [W / 128, T, 128]
    x: Any  # like delta: delta * u
    sums: Any  # [1, W / 128, 144, 128], of _StateSums: for y


class BackwardScratch(NamedTuple):
    """VMEM of the backward kernel, all float32, with W split into [W / 128] and 128."""

    B: Any  # [T, S, 128]: the column of each token, repeated over all lanes
    C: Any  # like B
    dB: Any  # [T, S, 128]: the products whose sums over lanes are the gradients of B
    dC: Any  # like dB
    delta: Any  # [W / 128, T, 128]
    x: Any  # like delta: delta * u
    dy: Any  # [W / 128, 16, 128], of a group: the gradient of y before skip and gate
    states: Any  # [T + 1, S, W]: before token t, and after the last
    sums: Any  # [3, W / 128, 144, 128], of _StateSums: for y, x and delta


class _StateSums:
    """Sums over the states of a group's 16 arrays [S, W], as the rows of [16, W].

    Eight partial sums of each array go to VMEM. Loads with a stride bring the same one of eight
    tokens to the rows of a register, so that whole registers are added. The arrays lie nine rows
    apart: rows at a distance of eight are in the same bank of VMEM.
    """

    def __init__(self, ref: Any) -> None:
        self._ref = ref  # [W / 128, 144, 128]

    def add(self, j: int, x: Array) -> None:
        """Add the array of token j."""
        folded: Any = sum(x[i : i + SUBLANES] for i in range(0, len(x), SUBLANES))
        _put(self._ref, pl.ds(j * (SUBLANES + 1), SUBLANES), folded)

    def rows(self) -> Array:
        """Return the sums, after all arrays were added."""
        eights = (range(j, j + SUBLANES) for j in range(0, SUM_ROWS, SUM_ROWS // 2))
        return jnp.concatenate([sum(map(self._partial, rows)) for rows in eights])

    def _partial(self, row: int) -> Any:
        return _get(self._ref, pl.ds(row, SUBLANES, stride=SUBLANES + 1))


def forward(
    inputs: Inputs, initial_state: Any, results: Results, scratch: ForwardScratch, *, length: int
) -> None:
    """Write the results, given the state before the first chunk [S, P].

    `length` is that of the sequence; the last chunk may hold fewer than T of its tokens.
    """
    chunk, tile = pl.program_id(2), pl.program_id(3)
    groups = _groups(inputs, chunk, length)
    inputs, (h0, state) = _of_tile(inputs, tile, (initial_state, results.final_state))

    @pl.when(chunk == 0)
    def _() -> None:
        state[...] = h0[...]

    @pl.when(tile == 0)
    def _() -> None:
        _repeat_columns(inputs, scratch, groups)

    if results.starts is not None:
        results.starts[...] = state[...]
    _prepare(inputs, scratch, chunk, length)
    y_sums = _StateSums(scratch.sums.at[0])

    def step(i: Any, resets: Any, h: Array) -> Array:
        A = inputs.A[...]
        for j in range(GROUP):
            h = _next_state(scratch, A, i * GROUP + j, _unless_reset(resets, j, h))
            y_sums.add(j, h * _over_channels(scratch.C[i * GROUP + j], h))
        u = _load(inputs.u, i)
        out = y_sums.rows() + inputs.D[...] * u
        if inputs.z is not None:
            z = _load(inputs.z, i)
            out = out * z * jax.nn.sigmoid(z)
        results.y[_rows(i), :] = out.astype(results.y.dtype)
        return h

    state[...] = lax.fori_loop(0, groups, partial(_with_resets, inputs, step), state[...])


def backward(
    inputs: Inputs,
    starts: Any,
    dy: Any,
    dh_final: Any,
    grads: Gradients,
    scratch: BackwardScratch,
    *,
    length: int,
) -> None:
    """Write the gradients, given the state at the chunk's start [S, W] and dy [T, W].

    `dh_final` [S, P] is the gradient of the state after the last token.
    """
    step_of_grid, tile = pl.program_id(2), pl.program_id(3)
    chunk = pl.num_programs(2) - 1 - step_of_grid
    groups = _groups(inputs, chunk, length)
    of_channels = dh_final, grads.initial_state, grads.A, grads.D, grads.dt_bias
    inputs, (dh_final, dh, dA, dD, d_bias) = _of_tile(inputs, tile, of_channels)
    grads = grads._replace(initial_state=dh, A=dA, D=dD, dt_bias=d_bias)

    @pl.when((step_of_grid == 0) & (tile == 0))
    def _() -> None:
        for ref in (scratch.dB, scratch.dC):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(step_of_grid == 0)
    def _() -> None:
        dh[...] = dh_final[...]
        for ref in (dA, dD, d_bias):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(tile == 0)
    def _() -> None:
        _repeat_columns(inputs, scratch, groups)

    _prepare(inputs, scratch, chunk, length)

    def recompute(i: Any, resets: Any, h: Array) -> Array:
        A = inputs.A[...]
        for j in range(GROUP):
            scratch.states[i * GROUP + j] = h
            h = _next_state(scratch, A, i * GROUP + j, _unless_reset(resets, j, h))
        scratch.states[(i + 1) * GROUP] = h
        return h

    lax.fori_loop(0, groups, partial(_with_resets, inputs, recompute), starts[...])
    back = _step_back(inputs, dy, grads, scratch, chunk, length)

    def reverse(i: Any, dh: Array) -> Array:
        return _with_resets(inputs, back, groups - 1 - i, dh)

    dh[...] = lax.fori_loop(0, groups, reverse, dh[...])

    @pl.when(tile == pl.num_programs(3) - 1)
    def _() -> None:
        for ref, products in ((grads.B, scratch.dB), (grads.C, scratch.dC)):
            ref[...] = lax.fori_loop(0, groups, partial(_sum_lanes, products), jnp.zeros_like(ref))


def _step_back(
    inputs: Inputs,
    dy: Any,
    grads: Gradients,
    scratch: BackwardScratch,
    chunk: Any,
    length: int,
) -> Callable[[Any, Any, Array], Array]:
    """Return the step from the gradient of the state after a group to that of the one before."""
    y_sums, dx_sums, d_delta_sums = (_StateSums(scratch.sums.at[i]) for i in range(3))

    def step(i: Any, resets: Any, dh: Array) -> Array:
        valid = _valid(inputs, chunk, i, length)
        u = _load(inputs.u, i, valid)
        dy_group = dy_scan = _load(dy, i, valid)
        if inputs.z is not None:
            z = _load(inputs.z, i, valid)
            opening = jax.nn.sigmoid(z)
            dy_scan = dy_group * (z * opening)
        _put(scratch.dy, slice(None), dy_scan)
        A = inputs.A[...]
        dA = jnp.zeros_like(A)
        h = scratch.states[(i + 1) * GROUP]
        for j in reversed(range(GROUP)):
            token = i * GROUP + j
            delta, x = (_row(ref, token, dh) for ref in (scratch.delta, scratch.x))
            dy_row = _row(scratch.dy, j, dh)
            B, C = (_over_channels(ref[token], dh) for ref in (scratch.B, scratch.C))
            dh = dh + dy_row * C
            scratch.dB[token] += _fold(dh * x)
            scratch.dC[token] += _fold(h * dy_row)
            if inputs.z is not None:
                y_sums.add(j, h * C)
            dx_sums.add(j, dh * B)
            h = scratch.states[token]
            dh = _unless_reset(resets, j, dh * jnp.exp2(delta * A))
            exponent = dh * _unless_reset(resets, j, h)  # the gradient of delta * A
            d_delta_sums.add(j, exponent * A)
            dA = dA + exponent * delta
        grads.A[...] += dA
        dx = dx_sums.rows()
        delta = _get(scratch.delta, _rows(i))
        slope = jnp.exp(_load(inputs.dt, i, valid) + inputs.dt_bias[...] - delta)  # of the softplus
        if valid is not None:
            slope = jnp.where(valid, slope, 0)
        d_dt = (d_delta_sums.rows() * math.log(2) + dx * u) * slope
        D = inputs.D[...]
        du = dx * delta + D * dy_scan
        grads.u[_rows(i), :] = du.astype(grads.u.dtype)
        grads.dt[_rows(i), :] = d_dt.astype(grads.dt.dtype)
        if inputs.z is not None:
            dz = dy_group * (y_sums.rows() + D * u) * (opening * (1 + z * (1 - opening)))
            grads.z[_rows(i), :] = dz.astype(grads.z.dtype)
        for ref, x in ((grads.D, dy_scan * u), (grads.dt_bias, d_dt)):
            ref[...] += x[:SUBLANES] + x[SUBLANES:]
        return dh

    return step


def _of_tile(inputs: Inputs, tile: Any, of_channels: tuple[Any, ...]) -> tuple[Inputs, list[Any]]:
    """Return the inputs and further references [..., P] with only the tile's channels."""
    width = inputs.u.shape[1]
    channels = pl.ds(pl.multiple_of(tile * width, width), width)
    A, D, bias, *others = (
        ref.at[:, channels] for ref in (inputs.A, inputs.D, inputs.dt_bias, *of_channels)
    )
    return inputs._replace(A=A, D=D, dt_bias=bias), others


def _groups(inputs: Inputs, chunk: Any, length: int) -> Any:
    """Return how many groups of a chunk hold tokens."""
    tokens = inputs.u.shape[0]
    if length % tokens == 0:
        return tokens // GROUP
    left = jnp.minimum(tokens, length - chunk * tokens)
    return lax.div(left + GROUP - 1, GROUP)  # `//` would ask JAX for the device


def _repeat_columns(inputs: Inputs, scratch: Any, groups: Any) -> None:
    """Write a chunk's columns of B and C, [T, S, 128]."""

    def step(i: Any, columns: tuple[Array, Array]) -> tuple[Array, Array]:
        for x, ref in zip(columns, (scratch.B, scratch.C), strict=True):
            for j in range(GROUP):
                ref[i * GROUP + j] = jnp.broadcast_to(x[:, j : j + 1], x.shape)
        first, second = (pltpu.roll(x, LANES - GROUP, axis=1) for x in columns)
        return first, second

    lax.fori_loop(0, groups, step, (inputs.B[...], inputs.C[...]))


def _prepare(inputs: Inputs, scratch: Any, chunk: Any, length: int) -> None:
    """Write a chunk's delta and delta * u; past the end of the sequence, both are zero."""

    def step(i: Any, _: Any) -> None:
        valid = _valid(inputs, chunk, i, length)
        dt = _load(inputs.dt, i, valid) + inputs.dt_bias[...]
        delta = jnp.maximum(dt, 0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
        if valid is not None:  # a token with no time step does not change the state
            delta = jnp.where(valid, delta, 0)
        _put(scratch.delta, _rows(i), delta)
        _put(scratch.x, _rows(i), delta * _load(inputs.u, i, valid))

    lax.fori_loop(0, inputs.u.shape[0] // GROUP, step, None, unroll=2)


def _next_state(scratch: Any, A: Array, token: Any, h: Array) -> Array:
    """Return the state after a token, given the one before and A."""
    delta, x = (_row(ref, token, h) for ref in (scratch.delta, scratch.x))
    return jnp.exp2(delta * A) * h + x * _over_channels(scratch.B[token], h)


def _with_resets(
    inputs: Inputs, step: Callable[[Any, Any, Array], Array], i: Any, h: Array
) -> Array:
    """Return step(i, resets, h) for group i, with resets None if no token of it has one.

    So the many groups in the middle of a document do no work for resets.
    """
    if inputs.resets is None:
        return step(i, None, h)
    resets = inputs.resets[0, i]
    return lax.cond(resets == 0, partial(step, i, None), partial(step, i, resets), h)


def _unless_reset(resets: Any, j: int, h: Array) -> Array:
    """Return h, or zero where token j of the group begins a document; h may be infinite."""
    return h if resets is None else jnp.where(resets & (1 << j) != 0, 0.0, h)


def _fold(x: Array) -> Array:
    """Return x [S, W] summed to [S, 128]."""
    return sum((x[:, k : k + LANES] for k in range(LANES, x.shape[1], LANES)), x[:, :LANES])


def _sum_lanes(products: Any, i: Any, sums: Array) -> Array:
    """Return `sums` [S, 128] with those over the lanes of group i's products, and clear these."""
    lane = lax.broadcasted_iota(jnp.int32, sums.shape, 1) - i * GROUP
    for j in range(GROUP):
        total = jnp.sum(products[i * GROUP + j], axis=1, keepdims=True)
        sums = jnp.where(lane == j, total, sums)
        products[i * GROUP + j] = jnp.zeros_like(sums)
    return sums


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


def _load(ref: Any, i: Any, valid: Array | None = None) -> Array:
    x = ref[_rows(i), :].astype(jnp.float32)
    return x if valid is None else jnp.where(valid, x, 0)


def _put(ref: Any, rows: Any, x: Array) -> None:
    """Store x [rows, W] in rows of `ref` [W / 128, ..., 128]."""
    ref[:, rows, :] = jnp.stack([x[:, k : k + LANES] for k in range(0, x.shape[1], LANES)])


def _get(ref: Any, rows: Any) -> Array:
    """Return rows of `ref` [W / 128, ..., 128] as [rows, W]."""
    return jnp.concatenate([*ref[:, rows, :]], axis=1)


def _row(ref: Any, row: Any, like: Array) -> Array:
    """Return a row of `ref` [W / 128, ..., 128] repeated over the states, like [S, W]."""
    rows = ref[:, pl.ds(row, 1), :]
    return jnp.concatenate([*jnp.broadcast_to(rows, (len(rows), len(like), LANES))], axis=1)


def _over_channels(column: Array, like: Array) -> Array:
    """Return a column repeated over the lanes, [S, 128], repeated over all channels."""
    return jnp.concatenate([column] * (like.shape[1] // LANES), axis=1)
