"""The selective scan on NVIDIA GPUs, as Triton kernels called through jax-triton.

The kernels (`triton_kernels`) read u, dt and z once each and write y once; the time step's bias and
softplus, the skip D and the gate are part of them. When the scan is differentiated, the forward
kernel also writes the state before each chunk of tokens, from which the backward kernel recomputes
the states of one chunk at a time.

A program has 32 channels, and its warps divide the states between them: a multiprocessor needs
several warps per scheduler to hide latencies, and batch * E / 32 warps are few for a large GPU. Per
token and state the forward kernel issues about 11 instructions, one of them the exponential, and
the backward kernel about 31. The time steps' softplus, the gate and the loads add about 60 and 120
per token, computed once for all states; exchanges between warps add about 15 and 40 per token and
warp. Sums over channels, the gradients of B and C, cross the threads of a warp once and leave one
sum per program for XLA to add: no atomics, so every run gives the same bits. With 16 tokens and 32
channels these sums take S / 4 bytes for every token and channel, as do the states before the
chunks. A second pass, over the chunks in parallel, could add up more channels before it writes, but
would compute all exponentials and read all inputs again, which costs more than these sums.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import triton_call
from kernels.checks import refused_dtype
from kernels.custom_vjp import custom_vjp, kept_by_remat
from kernels.manual_axes import vary_alike
from kernels.scan_inputs import ScanInputs, float32_or_zeros, per_token
from kernels.scan_tiles import choose_scan_tile
from kernels.triton_call import Launch, Run

_f32 = jnp.float32
_DTYPES = ("bfloat16", "float32")
_THREADS = 32  # per warp
_MAX_BATCH = 65535  # limit of a grid's second dimension


class Tile(NamedTuple):
    """The part of the scan that one program works on at a time; all are powers of two."""

    tokens: int  # per chunk
    channels: int
    warps: int


class _Arrays(NamedTuple):
    """The scan's inputs in the form that the kernels take."""

    u: Array  # [B, L, E]
    dt: Array  # [B, L, E]
    A: Array  # [S, E], float32
    B: Array  # [B, L, S], float32
    C: Array  # [B, L, S], float32
    D: Array  # [E], float32
    z: Array | None  # [B, L, E]
    dt_bias: Array | None  # [E], float32
    segment_ids: Array | None  # [B, L], int32
    initial_state: Array  # [B, S, E], float32


# Tokens: the most with which no kernel runs out of registers on sm_80 and sm_90.
DEFAULT = Tile(tokens=16, channels=32, warps=4)
_LARGEST = Tile(tokens=32, channels=32, warps=8)


def selective_scan(inputs: ScanInputs) -> tuple[Array, Array]:
    """Return (y, final state), computed on an NVIDIA GPU.

    Results are those of `kernels.selective_scan.selective_scan`. How many tokens, channels and
    warps a program has is measured once on each kind of device (`kernels.tuning`);
    `FLOWHN_SELECTIVE_SCAN_TILE=tokens,channels,warps` sets it.

    Raises:
      ValueError: the environment's tile is not valid.
    """
    return scan_with(triton_call.for_target(call_triton), _choose(inputs), inputs)


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels, or this installation, cannot run the inputs; None if they can."""
    u, A = inputs.x, inputs.A
    if u.shape[0] > _MAX_BATCH:
        return f"the batch size {u.shape[0]} is above {_MAX_BATCH}"
    if 0 in u.shape or 0 in A.shape:
        return f"u {u.shape} or A {A.shape} is empty"
    return triton_call.unsupported() or refused_dtype(per_token(inputs), _DTYPES)


def scan_with(run: Run, tile: Tile, inputs: ScanInputs) -> tuple[Array, Array]:
    """Return what `selective_scan` does, with this tile and this way to run the kernels."""
    batch, _, width = inputs.x.shape
    bias, ids = inputs.dt_bias, inputs.segment_ids
    arrays = _Arrays(
        u=inputs.x,
        dt=inputs.dt,
        A=inputs.A.astype(_f32).T,
        B=inputs.B.astype(_f32),
        C=inputs.C.astype(_f32),
        D=float32_or_zeros(inputs.D, (width,)),
        z=inputs.z,
        dt_bias=None if bias is None else bias.astype(_f32),
        segment_ids=None if ids is None else ids.astype(jnp.int32),
        initial_state=float32_or_zeros(inputs.initial_state, (batch, width, inputs.A.shape[1])).mT,
    )
    y, state = _scan(run, tile, vary_alike(arrays))
    return y, state.mT


@custom_vjp(nondiff_argnums=(0, 1))
def _scan(run: Run, tile: Tile, arrays: _Arrays) -> tuple[Array, Array]:
    """Return y [B, L, E] and the last state [B, S, E]."""
    results = triton_call.execute(run, _forward(tile, arrays, keeps_starts=False))
    return results["y"], results["last"]


def _scan_forward(run: Run, tile: Tile, arrays: _Arrays):
    """Return the results, and the arguments with the states before the chunks for the initial."""
    results = kept_by_remat(triton_call.execute(run, _forward(tile, arrays, keeps_starts=True)))
    residuals = arrays._replace(initial_state=results["starts"])
    return (results["y"], results["last"]), residuals


def _scan_backward(run: Run, tile: Tile, residuals: _Arrays, cotangents):
    results = triton_call.execute(run, _backward(tile, residuals, *cotangents))
    gradients = _Arrays(
        u=results["du"],
        dt=results["ddt"],
        A=results["dA"].sum(0),
        B=results["dB"].sum(0).mT,
        C=results["dC"].sum(0).mT,
        D=results["dD"].sum(0),
        z=None if residuals.z is None else results["dz"],
        dt_bias=None if residuals.dt_bias is None else results["dbias"].sum(0),
        segment_ids=None,
        initial_state=results["dinitial"],
    )
    return (gradients,)


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(tile: Tile, arrays: _Arrays, *, keeps_starts: bool) -> Launch:
    batch, length, width = arrays.u.shape
    states = arrays.A.shape[0]
    starts = (batch, -(-length // tile.tokens), states, width) if keeps_starts else (1,)
    return Launch(
        kernel="forward",
        inputs=(*_pointers(arrays), arrays.initial_state),
        outputs={
            "y": jax.ShapeDtypeStruct(arrays.u.shape, arrays.u.dtype),
            "last": jax.ShapeDtypeStruct((batch, states, width), _f32),
            "starts": jax.ShapeDtypeStruct(starts, _f32),
        },
        grid=(-(-width // tile.channels), batch),
        constants=_constants(tile, arrays) | {"KEEPS_STARTS": keeps_starts},
        warps=tile.warps,
    )


def _backward(tile: Tile, residuals: _Arrays, dy: Array, dlast: Array) -> Launch:
    batch, length, width = residuals.u.shape
    states = residuals.A.shape[0]
    programs = -(-width // tile.channels)
    dz = jax.ShapeDtypeStruct((1,), _f32) if residuals.z is None else residuals.z
    return Launch(
        kernel="backward",
        inputs=(*_pointers(residuals), residuals.initial_state, dy, dlast),
        outputs={
            "du": jax.ShapeDtypeStruct(residuals.u.shape, residuals.u.dtype),
            "ddt": jax.ShapeDtypeStruct(residuals.dt.shape, residuals.dt.dtype),
            "dz": jax.ShapeDtypeStruct(dz.shape, dz.dtype),
            "dB": jax.ShapeDtypeStruct((programs, batch, states, length), _f32),
            "dC": jax.ShapeDtypeStruct((programs, batch, states, length), _f32),
            "dA": jax.ShapeDtypeStruct((batch, states, width), _f32),
            "dD": jax.ShapeDtypeStruct((batch, width), _f32),
            "dbias": jax.ShapeDtypeStruct((batch, width), _f32),
            "dinitial": jax.ShapeDtypeStruct((batch, states, width), _f32),
        },
        grid=(programs, batch),
        constants=_constants(tile, residuals),
        warps=tile.warps,
    )


def _pointers(arrays: _Arrays) -> tuple[Array, ...]:
    """Return the inputs of both kernels; in place of None they get u, which is then not read."""
    return tuple(arrays.u if x is None else x for x in arrays[:-1])


def _constants(tile: Tile, arrays: _Arrays) -> dict[str, Any]:
    _, length, width = arrays.u.shape
    return {
        "L": length,
        "E": width,
        "S": arrays.A.shape[0],
        "TOKENS": tile.tokens,
        "CHANNELS": tile.channels,
        "STATES": tile.warps * _THREADS // tile.channels,
        "HAS_Z": arrays.z is not None,
        "HAS_BIAS": arrays.dt_bias is not None,
        "HAS_IDS": arrays.segment_ids is not None,
    }


def call_triton(launch: Launch, compute_capability: int | None = None) -> tuple[Array, ...]:
    """Run a kernel of `triton_kernels`, as `triton_call.call` does."""
    from kernels.selective_scan import triton_kernels

    return triton_call.call(triton_kernels, "selective_scan", launch, compute_capability)


def _choose(inputs: ScanInputs) -> Tile:
    tile = Tile(*choose_scan_tile("selective_scan", inputs, candidates(inputs), DEFAULT, timed))
    if any(n.bit_count() != 1 or n > most for n, most in zip(tile, _LARGEST, strict=True)):
        raise ValueError(
            "FLOWHN_SELECTIVE_SCAN_TILE must be tokens,channels,warps, powers of two of at most "
            f"{','.join(map(str, _LARGEST))}, e.g. {','.join(map(str, DEFAULT))}; "
            f"got {','.join(map(str, tile))}"
        )
    return tile


def candidates(inputs: ScanInputs) -> list[Tile]:
    """Return the tiles to try, with more warps if there are few channels in all sequences."""
    batch, _, width = inputs.x.shape
    warps = (1, 2, 4) if batch * width > 16384 else (2, 4, 8)
    return [Tile(tokens, 32, count) for tokens in (16, 8) for count in warps]


def timed(tile: Sequence[int]) -> Callable[[ScanInputs], tuple[Array, Array]]:
    """Return the scan with a tile, of which `kernels.scan_tiles` times the gradients."""
    return partial(scan_with, call_triton, Tile(*tile))
