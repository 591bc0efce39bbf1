"""The selective scan on TPUs: calls of its two Pallas kernels, forward and backward.

The kernels read u, dt and z once and write y once, in their own dtypes; softplus, skip and gate are
part of them. When the scan is differentiated, the forward kernel also saves the state at each
chunk's start, [B, chunks, S, E], from which the backward kernel recomputes the others.

Inside this file the inner width is the minor dimension: A is [S, E] and states are [B, S, E].
"""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.checks import refused_dtype
from kernels.custom_vjp import custom_vjp, kept_by_remat
from kernels.manual_axes import vary_alike
from kernels.pallas_scan import WALK, arrays_and_blocks, like, moved_bytes
from kernels.scan_inputs import ScanInputs, float32_or_zeros, per_token
from kernels.selective_scan import pallas_tpu_kernels as kernels
from kernels.selective_scan.pallas_tpu_kernels import (
    GROUP,
    LANES,
    LOG2_E,
    SUBLANES,
    SUM_ROWS,
    BackwardScratch,
    ForwardScratch,
    Gradients,
    Inputs,
    Results,
)

_DTYPES = ("bfloat16", "float32")
_MAX_STATES = 128
_MAX_STATE_NUMBERS = 2**16  # of a part


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels cannot run the inputs; None if they can."""
    if inputs.A.shape[1] > _MAX_STATES:
        return f"it has {inputs.A.shape[1]} states per channel, more than {_MAX_STATES}"
    return refused_dtype(per_token(inputs), _DTYPES)


def selective_scan(inputs: ScanInputs, *, interpret: bool = False) -> tuple[Array, Array]:
    """Return what `kernels.selective_scan.selective_scan` does, computed by the TPU kernels.

    Args:
      inputs: the inputs of the scan.
      interpret: whether to interpret the kernels, which is slow, but works on any platform.
    """
    batch, _, width = inputs.x.shape
    states = inputs.A.shape[1]
    resets = None
    if (ids := inputs.segment_ids) is not None:
        changes = ids[:, 1:] != ids[:, :-1]
        resets = jnp.pad(changes.astype(jnp.int32), ((0, 0), (1, 0)))

    # Padded channels and states have inputs, B and C of zero, and so states of zero.
    channels, more_states = (0, -width % LANES), (0, -states % SUBLANES)

    def pad_minor(x: Array, minor: tuple[int, int]) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), minor))

    padded = Inputs(
        u=pad_minor(inputs.x, channels),
        dt=pad_minor(inputs.dt, channels),
        z=None if inputs.z is None else pad_minor(inputs.z, channels),
        B=pad_minor(inputs.B, more_states),
        C=pad_minor(inputs.C, more_states),
        A=jnp.pad(inputs.A.astype(jnp.float32).T, (more_states, channels)),
        D=jnp.pad(float32_or_zeros(inputs.D, (width,)), channels)[None],
        dt_bias=jnp.pad(float32_or_zeros(inputs.dt_bias, (width,)), channels)[None],
        resets=resets,
    )
    h0 = float32_or_zeros(inputs.initial_state, (batch, width, states)).mT
    h0 = jnp.pad(h0, ((0, 0), more_states, channels))
    y, state = _scan(interpret, *vary_alike((padded, h0)))
    return y[..., :width], state[:, :states, :width].mT


@custom_vjp(nondiff_argnums=(0,))
def _scan(interpret: bool, inputs: Inputs, h0: Array) -> tuple[Array, Array]:
    """Return y [B, L, E] in u's dtype and the last state [B, S, E]; E and S are whole registers."""
    y, state, _ = _call_forward(interpret, inputs, h0, save_starts=False)
    return y, state


def _scan_forward(interpret: bool, inputs: Inputs, h0: Array) -> tuple[Any, Any]:
    y, state, starts = kept_by_remat(_call_forward(interpret, inputs, h0, save_starts=True))
    return (y, state), (inputs, starts)


def _scan_backward(interpret: bool, residuals: Any, cotangents: Any) -> tuple[Inputs, Array]:
    inputs, starts = residuals
    batch, length, _ = inputs.u.shape
    grads = _call_backward(interpret, inputs, starts, *cotangents)

    def over_parts(sums: Array, like: Array) -> Array:
        tokens = sums.sum(0)[..., : _tiles(inputs).chunk].mT  # [B, chunks, T, S]
        return tokens.reshape(batch, -1, like.shape[2])[:, :length].astype(like.dtype)

    of_inputs = Inputs(
        u=grads.u,
        dt=grads.dt,
        z=grads.z,
        B=over_parts(grads.B, inputs.B),
        C=over_parts(grads.C, inputs.C),
        A=grads.A.sum(0),
        D=grads.D.sum((0, 1))[None],
        dt_bias=grads.dt_bias.sum((0, 1))[None],
        resets=None,
    )
    return of_inputs, grads.initial_state


_scan.defvjp(_scan_forward, _scan_backward)


class _Tiles(NamedTuple):
    """The part of the scan that one grid step works on, and the channels of adjacent ones."""

    chunk: int  # tokens
    width: int  # channels
    part: int  # channels whose chunks alternate, several tiles


def _tiles(inputs: Inputs) -> _Tiles:
    """Return tiles with which the backward kernel fits in 16 MiB of VMEM (default of TPU v4, v5e).

    For a chunk it keeps the states, 4 bytes x chunk x S x width, four arrays of 128 channels like
    them, for B, C and their gradients, and two copies of each of its blocks. 512 channels of 16
    states take 8 of 64 registers. A TPU of two cores divides sequences and parts between them.
    """
    batch, length, width = inputs.u.shape
    states = inputs.A.shape[0]
    chunk = LANES if states <= 32 else LANES // 2 if states <= 64 else LANES // 4
    widest = LANES * max(1, 64 // max(states, 16))
    tile = next(n for n in (4 * LANES, 2 * LANES, LANES) if width % n == 0 and n <= widest)
    parts = [width // n for n in range(tile, width + 1, tile) if width % n == 0]
    fitting = [n for n in parts if width // n * states <= _MAX_STATE_NUMBERS]
    even = [n for n in fitting if batch * n % 2 == 0]
    return _Tiles(min(chunk, length + -length % GROUP), tile, width // min(even or fitting))


class _Specs:
    """The blocks of a grid (sequences, parts, chunks, tiles of a part)."""

    def __init__(self, inputs: Inputs, tiles: _Tiles, *, reverse: bool):
        batch, length, width = inputs.u.shape
        states = inputs.A.shape[0]
        chunk, tile, part = tiles
        chunks = pl.cdiv(length, chunk)
        each = part // tile

        def at(t: Any) -> Any:
            return chunks - 1 - t if reverse else t

        def tokens(b: Any, p: Any, t: Any, e: Any) -> Any:
            return b, at(t), p * each + e

        def starts(b: Any, p: Any, t: Any, e: Any) -> Any:
            return b, at(t), 0, p * each + e

        def of_chunk(b: Any, p: Any, t: Any, e: Any) -> Any:
            return b, at(t), 0, 0

        def of_part(b: Any, p: Any, t: Any, e: Any) -> Any:
            return b, 0, p

        self.grid = batch, width // part, chunks, each
        self.tokens = pl.BlockSpec((None, chunk, tile), tokens)
        self.starts = pl.BlockSpec((None, None, states, tile), starts)
        self.state = pl.BlockSpec((None, states, part), of_part)
        self.channel_sums = pl.BlockSpec((None, SUBLANES, part), of_part)
        self.token_sums = pl.BlockSpec(
            (None, None, None, states, LANES), lambda b, p, t, e: (p, b, at(t), 0, 0)
        )
        self.columns = pl.BlockSpec((None, None, states, LANES), of_chunk)
        self.rates = pl.BlockSpec((states, part), lambda b, p, t, e: (0, p))
        self.per_channel = pl.BlockSpec((1, part), lambda b, p, t, e: (0, p))
        self.resets = pl.BlockSpec(
            (None, None, 1, chunk // GROUP), of_chunk, memory_space=pltpu.SMEM
        )


def _arrange(specs: _Specs, inputs: Inputs, tiles: _Tiles) -> Inputs:
    """Return the inputs in the form that the kernels take, with their blocks.

    A is multiplied by log2(e), B and C are [B, chunks, S, 128] with tokens in lanes, and resets are
    [B, chunks, 1, T / 16], one bit per token.
    """
    chunk = tiles.chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0)))
        return x.reshape(x.shape[0], -1, chunk, x.shape[2]).mT

    def lanes(x: Array) -> Array:
        return jnp.pad(chunks(x.astype(jnp.float32)), ((0, 0), (0, 0), (0, 0), (0, LANES - chunk)))

    resets = inputs.resets
    if resets is not None:
        groups = chunks(resets[..., None]).reshape(len(resets), -1, 1, chunk // GROUP, GROUP)
        resets = jnp.sum(groups << jnp.arange(GROUP), axis=-1)
    return Inputs(
        u=(inputs.u, specs.tokens),
        dt=(inputs.dt, specs.tokens),
        z=None if inputs.z is None else (inputs.z, specs.tokens),
        B=(lanes(inputs.B), specs.columns),
        C=(lanes(inputs.C), specs.columns),
        A=(inputs.A * LOG2_E, specs.rates),
        D=(inputs.D, specs.per_channel),
        dt_bias=(inputs.dt_bias, specs.per_channel),
        resets=None if resets is None else (resets, specs.resets),
    )


def _call_forward(interpret: bool, inputs: Inputs, h0: Array, *, save_starts: bool) -> Results:
    """Return y, the last state and, with `save_starts`, the states at the chunks' starts."""
    tiles = _tiles(inputs)
    specs = _Specs(inputs, tiles, reverse=False)
    batch, length, _ = inputs.u.shape
    starts = like(h0, (batch, specs.grid[2], *h0.shape[1:]))
    return _call(
        partial(kernels.forward, length=length),
        specs,
        _arrange(specs, inputs, tiles),
        ((h0, specs.state),),
        Results(
            y=(like(inputs.u), specs.tokens),
            final_state=(like(h0), specs.state),
            starts=(starts, specs.starts) if save_starts else None,
        ),
        scratch_shapes=(ForwardScratch(**_shared_scratch(inputs, tiles, sums=1)),),
        operations=(6, 1),
        interpret=interpret,
        name="selective_scan_forward",
    )


def _call_backward(
    interpret: bool, inputs: Inputs, starts: Array, dy: Array, dh_final: Array
) -> Gradients:
    """Return the gradients: of B and C per part, of A, D and dt_bias per sequence."""
    tiles = _tiles(inputs)
    specs = _Specs(inputs, tiles, reverse=True)
    batch, length, width = inputs.u.shape
    states = inputs.A.shape[0]
    token_sums = like(dh_final, (specs.grid[1], batch, specs.grid[2], states, LANES))
    channel_sums = like(dh_final, (batch, SUBLANES, width))
    return _call(
        partial(kernels.backward, length=length),
        specs,
        _arrange(specs, inputs, tiles),
        ((starts, specs.starts), (dy, specs.tokens), (dh_final, specs.state)),
        Gradients(
            u=(like(inputs.u), specs.tokens),
            dt=(like(inputs.dt), specs.tokens),
            z=None if inputs.z is None else (like(inputs.z), specs.tokens),
            B=(token_sums, specs.token_sums),
            C=(token_sums, specs.token_sums),
            A=(like(dh_final), specs.state),
            D=(channel_sums, specs.channel_sums),
            dt_bias=(channel_sums, specs.channel_sums),
            initial_state=(like(dh_final), specs.state),
        ),
        scratch_shapes=(
            BackwardScratch(
                **_shared_scratch(inputs, tiles, sums=3),
                dB=_scratch(tiles.chunk, states, LANES),
                dC=_scratch(tiles.chunk, states, LANES),
                dy=_scratch(tiles.width // LANES, GROUP, LANES),
                states=_scratch(tiles.chunk + 1, states, tiles.width),
            ),
        ),
        operations=(22, 2),
        interpret=interpret,
        name="selective_scan_backward",
    )


def _shared_scratch(inputs: Inputs, tiles: _Tiles, sums: int) -> dict[str, Any]:
    """Return the scratch that both kernels have, with `sums` sums over states at a time."""
    columns = _scratch(tiles.chunk, inputs.A.shape[0], LANES)
    rows = _scratch(tiles.width // LANES, tiles.chunk, LANES)
    of_states = _scratch(sums, tiles.width // LANES, SUM_ROWS, LANES)
    return {"B": columns, "C": columns, "delta": rows, "x": rows, "sums": of_states}


def _scratch(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)


def _call(
    kernel: Any,
    specs: _Specs,
    inputs: Inputs,
    others: tuple[tuple[Array, pl.BlockSpec], ...],
    results: Any,
    *,
    operations: tuple[int, int],
    **options: Any,
) -> Any:
    """Call a kernel.

    Args:
      kernel: the kernel of `pallas_tpu_kernels`.
      specs: blocks of its grid.
      inputs: with their blocks; see `arrays_and_blocks`.
      others: its further arguments, with their blocks.
      results: types of the results that this function returns, with their blocks.
      operations: floating-point operations and exponentials per token and state number.
      **options: further ones of `pallas_call`.
    """
    inputs, input_blocks = arrays_and_blocks(inputs)
    others, other_blocks = arrays_and_blocks(others)
    types, blocks = arrays_and_blocks(results)
    batch, parts, *_ = specs.grid
    per_part = [x for x in (inputs.B, inputs.C, inputs.resets) if x is not None]
    per_sequence = [inputs.A, inputs.D, inputs.dt_bias]
    state_numbers = inputs.u.size * inputs.A.shape[0]
    moved = moved_bytes((inputs, others, types))
    moved += (parts - 1) * moved_bytes(per_part) + (batch - 1) * moved_bytes(per_sequence)
    flops, transcendentals = (count * state_numbers for count in operations)
    (arrays,) = pl.pallas_call(
        kernel,
        grid=specs.grid,
        in_specs=(input_blocks, *other_blocks),
        out_shape=(types,),
        out_specs=(blocks,),
        cost_estimate=pl.CostEstimate(flops, transcendentals, moved),
        compiler_params=WALK,
        **options,
    )(inputs, *others)
    return arrays
