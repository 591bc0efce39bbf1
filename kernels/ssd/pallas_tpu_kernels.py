"""The Pallas kernels of state-space duality for TPUs: one chunk of one block of heads.

Per-token values are in lanes: the tokens' inputs [T, R P] are transposed to [R P, T] in VMEM, so
that a value per token and head scales the rows of its head without a broadcast over lanes, and sums
over a head's channels are sums over sublanes. Of the T x T matrices, tokens s are in sublanes and
t >= s in lanes. The state of every block of heads of a part is in VMEM while the grid walks over
the chunks.

Sizes in this file: T tokens of a chunk, R heads of a block, P channels of a head, S states. Rows
[R, T] hold a value per head and token; R is filled up to whole registers.
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from kernels.precision import product_precision

CHUNK = 128  # tokens, one per lane
SUBLANES = 8


class Inputs(NamedTuple):
    """What both kernels read, as references to blocks in VMEM or as arrays."""

    x: Any  # [T, R P], bfloat16 or float32
    delta: Any  # [R, T], float32, as are the next two
    coarse: Any  # [R, T], sum of log2-decays in the document up to the token: multiples of a grid
    fine: Any  # [R, T], and their rests
    B: Any  # [T, S], bfloat16 or float32
    C: Any  # [T, S], bfloat16 or float32
    D: Any  # [R, T], float32, the same number for all tokens
    document: Any  # [1, T], float32, numbered from 0 in each chunk; None: always 0


class Results(NamedTuple):
    """Blocks that the forward kernel writes."""

    y: Any  # [T, R P], in x's dtype
    final_state: Any  # [R P, S], float32, after the last chunk
    starts: Any  # [R P, S], before this chunk, in x's dtype; None: not kept


class Gradients(NamedTuple):
    """Blocks that the backward kernel writes; all but x's are float32."""

    x: Any  # [T, R P], in x's dtype
    delta: Any  # [R, T]
    exponents: Any  # [R, T], of the decays' natural logarithms
    B: Any  # [T, S], summed over the blocks of heads
    C: Any  # [T, S], like B
    D: Any  # [R, T], to be summed over the tokens
    initial_state: Any  # [R P, S]


class Scratch(NamedTuple):
    """VMEM that lasts from one grid step to the next, all float32."""

    states: Any  # [blocks, R P, S]: forward, the states; backward, their gradients
    scores: Any  # [T, T], C B^T of the chunk
    mask: Any  # [T, T], 0 where t sees s, else minus infinity


class _Chunk(NamedTuple):
    """A chunk's tokens of a block of heads in float32."""

    delta: Array  # [R, T]
    coarse: Array  # [R, T]
    coarse_of_s: Array  # [T, R]
    outward: Array  # [R, T], 2**fine
    inward: Array  # [R, T], 2**-fine
    before: Array  # [R, T], decay from the chunk's start
    after: Array  # [R, T], decay to the chunk's end


def forward(
    inputs: Inputs,
    initial_state: Any,
    results: Results,
    scratch: Scratch,
    *,
    length: int,
    size: int,
) -> None:
    """Write the results, given the state before the first chunk [R P, S].

    `length` is that of the sequence, of which the last chunk may hold fewer than T tokens; `size`
    is the P of this file.
    """
    chunk, block = pl.program_id(2), pl.program_id(3)
    dtype = inputs.x.dtype
    dot = partial(_dot, dtype)
    valid = _valid(chunk, length)

    _prepare(scratch, block, inputs, valid, initial_state, chunk == 0)
    tokens = _read(inputs)
    B, C = (_load(v, valid).astype(dtype) for v in (inputs.B, inputs.C))
    scores, mask = scratch.scores[...], scratch.mask[...]
    D = inputs.D[...]
    x_rows = _load(inputs.x, valid).T
    h = scratch.states[block]
    if results.starts is not None:
        results.starts[...] = h.astype(dtype)
    read = dot(h, C, contract=(1, 1))  # [R P, t]
    outputs, written, kept = [], [], []
    for head in range(read.shape[0] // size):
        rows, row = slice(head * size, (head + 1) * size), slice(head, head + 1)
        x = x_rows[rows]
        u = x * tokens.delta[row]
        weights = _decays(tokens, head, mask) * scores
        within = dot(u * tokens.inward[row], weights, contract=(1, 0)) * tokens.outward[row]
        outputs.append(within + tokens.before[row] * read[rows] + D[row] * x)
        written.append(u * tokens.after[row])
        kept.append(tokens.before[row, CHUNK - 1 :] * h[rows])
    results.y[...] = jnp.concatenate(outputs).T.astype(dtype)
    h = jnp.concatenate(kept) + dot(jnp.concatenate(written), B, contract=(1, 0))
    scratch.states[block] = h

    @pl.when(chunk == pl.num_programs(2) - 1)
    def _() -> None:
        results.final_state[...] = h


def backward(
    inputs: Inputs,
    starts: Any,
    dy: Any,
    dh_final: Any,
    grads: Gradients,
    scratch: Scratch,
    *,
    length: int,
    size: int,
) -> None:
    """Write the gradients; the grid walks from the last chunk to the first.

    Args:
      inputs: the inputs of the chunk.
      starts: the state before the chunk, [R P, S] in x's dtype.
      dy: [T, R P].
      dh_final: gradient of the state after the last chunk, [R P, S].
      grads: see `Gradients`.
      scratch: see `Scratch`.
      length: as in `forward`.
      size: as in `forward`.
    """
    step, block = pl.program_id(2), pl.program_id(3)
    dtype = inputs.x.dtype
    dot = partial(_dot, dtype)
    valid = _valid(pl.num_programs(2) - 1 - step, length)

    _prepare(scratch, block, inputs, valid, dh_final, step == 0)
    tokens = _read(inputs)
    x_rows = _load(inputs.x, valid).T
    dy_rows = _load(dy, valid).T
    B, C = _load(inputs.B, valid), _load(inputs.C, valid)
    h, dh = starts[...], scratch.states[block]
    read = dot(h, C, contract=(1, 1))  # [R P, t]
    arrived = dot(dh, B, contract=(1, 1))  # [R P, s]
    scores, mask = scratch.scores[...], scratch.mask[...]
    D = inputs.D[...]
    s, t = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    up_to, past = (s >= t).astype(jnp.float32), s < t
    is_last = lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1) == CHUNK - 1

    dscores = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    dx, written, dread, kept = [], [], [], []
    d_delta, of_pairs, of_before, of_after, dD = [], [], [], [], []
    for head in range(read.shape[0] // size):
        rows, row = slice(head * size, (head + 1) * size), slice(head, head + 1)
        x, dy_head = x_rows[rows], dy_rows[rows]
        delta, inward, before = tokens.delta[row], tokens.inward[row], tokens.before[row]
        after = tokens.after[row]
        u, v = x * (delta * inward), dy_head * tokens.outward[row]
        decays = _decays(tokens, head, mask)
        weights = decays * scores
        dweights = dot(u, v, contract=(0, 0))  # [s, t]
        dscores = dscores + dweights * decays
        # The exponent of a token u is a term of those of the pairs s < u <= t.
        from_s = dot(dweights * weights, up_to, contract=(1, 0))  # [s, u]
        of_pairs.append(_sum_sublanes(jnp.where(past, from_s, 0)))
        d_input = inward * dot(v, weights, contract=(1, 1)) + after * arrived[rows]
        dx.append(d_input * delta + D[row] * dy_head)
        d_delta.append(_sum_sublanes(d_input * x))
        dD.append(_sum_sublanes(dy_head * x))
        last = before[:, CHUNK - 1 :]
        of_last = last * jnp.sum(dh[rows] * h[rows].astype(jnp.float32), keepdims=True)
        of_start = before * _sum_sublanes(read[rows] * dy_head)
        of_before.append(of_start + jnp.where(is_last, of_last, 0))
        of_after.append(after * delta * _sum_sublanes(arrived[rows] * x))
        written.append(x * (delta * after))
        dread.append(dy_head * before)
        kept.append(last * dh[rows])

    padding = [jnp.zeros((inputs.delta.shape[0] - len(dx), CHUNK), jnp.float32)]
    padding = padding if padding[0].size else []

    def by_head(values: list[Array]) -> Array:
        return jnp.concatenate(values + padding)

    # Of each token u, the decays from the start to t >= u and those to the end from t < u.
    exact = partial(_dot, jnp.float32, contract=(1, 0))
    exponents = by_head(of_pairs) + exact(by_head(of_before), up_to)
    grads.exponents[...] = exponents + exact(by_head(of_after), past.astype(jnp.float32))
    grads.delta[...] = by_head(d_delta)
    grads.D[...] = by_head(dD)
    grads.x[...] = jnp.concatenate(dx).T.astype(grads.x.dtype)
    written, dread = jnp.concatenate(written), jnp.concatenate(dread)
    dB = dot(dscores, C, contract=(1, 0)) + dot(written, dh, contract=(0, 0))
    dC = dot(dscores, B, contract=(0, 0)) + dot(dread, h, contract=(0, 0))

    @pl.when(block == 0)
    def _() -> None:
        grads.B[...] = dB
        grads.C[...] = dC

    @pl.when(block > 0)
    def _() -> None:
        grads.B[...] += dB
        grads.C[...] += dC

    dh = jnp.concatenate(kept) + dot(dread, C, contract=(1, 0))
    scratch.states[block] = dh

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        grads.initial_state[...] = dh


def _dot(dtype: Any, a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    """Return the product over one dimension of each matrix, rounded to dtype, in float32."""
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=product_precision(dtype),
        preferred_element_type=jnp.float32,
    )


def _valid(chunk: Any, length: int) -> Array | None:
    """Return which tokens [T, 1] are in the sequence; None if all are.

    Data past the end of the last block is arbitrary, not zero.
    """
    if length % CHUNK == 0:
        return None
    return lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0) < length - chunk * CHUNK


def _load(ref: Any, valid: Array | None) -> Array:
    x = ref[...].astype(jnp.float32)
    return x if valid is None else jnp.where(valid, x, 0)


def _prepare(
    scratch: Scratch, block: Any, inputs: Inputs, valid: Array | None, first_state: Any, begins: Any
) -> None:
    """Fill the scratch where a block of heads needs it.

    Args:
      scratch: gets the first state where the walk begins, and at a chunk's first block what all
        blocks share.
      block: number of the block.
      inputs: the inputs of the chunk.
      valid: see `_valid`.
      first_state: the first state of the block, or its gradient, [R P, S].
      begins: whether the walk over the chunks begins here.
    """

    @pl.when(begins)
    def _() -> None:
        scratch.states[block] = first_state[...]

    @pl.when(block == 0)
    def _() -> None:
        B, C = _load(inputs.B, valid), _load(inputs.C, valid)
        scratch.scores[...] = _dot(inputs.x.dtype, B, C, contract=(1, 1))
        s, t = (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
        seen = s <= t
        if inputs.document is not None:
            of_t = inputs.document[...]
            seen &= jnp.broadcast_to(of_t, (SUBLANES, CHUNK)).T[:, :1] == of_t
        scratch.mask[...] = jnp.where(seen, 0, -jnp.inf)


def _read(inputs: Inputs) -> _Chunk:
    coarse, fine = inputs.coarse[...], inputs.fine[...]
    outward = jnp.exp2(fine)
    before = jnp.exp2(coarse + fine)
    last = slice(CHUNK - 1, CHUNK)
    after = jnp.exp2((coarse[:, last] - coarse) + (fine[:, last] - fine))
    if inputs.document is not None:
        document = inputs.document[...]
        before = jnp.where(document == 0, before, 0)
        after = jnp.where(document == document[:, last], after, 0)
    return _Chunk(
        delta=inputs.delta[...],
        coarse=coarse,
        coarse_of_s=coarse.T,
        outward=outward,
        inward=jnp.exp2(-fine),
        before=before,
        after=after,
    )


def _decays(tokens: _Chunk, head: int, mask: Array) -> Array:
    """Return the decays from s to t [s, t] of a head, without the factors of the fine sums."""
    of_t, of_s = tokens.coarse[head : head + 1], tokens.coarse_of_s[:, head : head + 1]
    return jnp.exp2((of_t - of_s) + mask)


def _sum_sublanes(x: Array) -> Array:
    return jnp.sum(x, axis=0, keepdims=True)
