"""State-space duality on NVIDIA GPUs, as Triton kernels called through jax-triton.

Two kernels (`triton_kernels`) walk over the chunks, forward with the state and backward with its
gradient, and write it at each chunk's border in x's dtype, to which products round it in any case.
All else is done for all chunks at the same time: the outputs, the gradients of x and the time
steps, and those of B and C, which are sums over the heads of a group. The matrices of a chunk stay
in registers and shared memory. There are no atomics, so every run gives the same bits.

Each float32 product is computed as three TF32 products, as exact as float32 within a few bits.
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
from kernels.scan_inputs import ScanInputs
from kernels.scan_tiles import choose_scan_tile
from kernels.ssd.kernel_inputs import LN_2, KernelInputs, chunk_sums, kernel_inputs
from kernels.triton_call import Launch, Run

_f32 = jnp.float32
_DTYPES = ("bfloat16", "float32")
_MAX_PROGRAMS = 65535  # limit of a grid's further dimensions
_MAX_SIZE = 128  # channels of a head
_MIN_SIZE = 16  # of each dimension of a product
_TILE_OF_STATES = 64


class Tile(NamedTuple):
    """The part of the scan that one program works on at a time."""

    tokens: int  # per chunk; a power of two from 16 to 128
    warps: int  # of a program; a power of two


# With bfloat16 and 128 states, no kernel runs out of registers on sm_80 and sm_90.
DEFAULT = Tile(tokens=64, warps=8)


def ssd(inputs: ScanInputs) -> tuple[Array, Array]:
    """Return (y, final state), computed on an NVIDIA GPU.

    Results are those of `kernels.ssd.ssd`. How many tokens a chunk has and how many warps a program
    is measured once on each kind of device (`kernels.tuning`); `FLOWHN_SSD_TILE=tokens,warps` sets
    it.

    Raises:
      ValueError: the environment's tile is not valid.
    """
    return ssd_with(triton_call.for_target(call_triton), _choose(inputs), inputs)


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels, or this installation, cannot run the inputs; None if they can."""
    batch, _, _, size = inputs.x.shape
    groups = inputs.B.shape[2]
    if batch * groups > _MAX_PROGRAMS:
        return f"the batch size {batch} times {groups} groups is above {_MAX_PROGRAMS}"
    if size > _MAX_SIZE:
        return f"it has {size} channels per head, more than {_MAX_SIZE}"
    products = dict(x=inputs.x, B=inputs.B, C=inputs.C)
    return triton_call.unsupported() or refused_dtype(products, _DTYPES)


def ssd_with(run: Run, tile: Tile, inputs: ScanInputs) -> tuple[Array, Array]:
    """Return what `ssd` does, with this tile and this way to run the kernels."""
    return _scan(run, tile, vary_alike(kernel_inputs(inputs, tile.tokens)))


@custom_vjp(nondiff_argnums=(0, 1))
def _scan(run: Run, tile: Tile, inputs: KernelInputs) -> tuple[Array, Array]:
    """Return y [B, L, H, P] in x's dtype and the last state [B, H, P, S]."""
    return _scan_forward(run, tile, inputs)[0]


def _scan_forward(run: Run, tile: Tile, inputs: KernelInputs):
    """Return the results, and the inputs with the states before the chunks for the initial."""
    states = kept_by_remat(triton_call.execute(run, _states_forward(tile, inputs)))
    residuals = inputs._replace(initial_state=states["starts"])
    results = kept_by_remat(triton_call.execute(run, _tokens_forward(tile, residuals)))
    return (results["y"], states["last"]), residuals


def _scan_backward(run: Run, tile: Tile, residuals: KernelInputs, cotangents):
    dy, dlast = cotangents
    results = triton_call.execute(run, _states_backward(tile, residuals, dy, dlast))
    for launch in (_tokens_backward, _group_sums):
        results |= triton_call.execute(run, launch(tile, residuals, dy, results["dends"]))
    length = residuals.x.shape[1]
    gradients = KernelInputs(
        x=results["dx"],
        delta=results["ddelta"].mT[:, :length],
        exponents=LN_2 * results["dexponents"].mT[:, :length],
        B=results["dB"],
        C=results["dC"],
        D=results["dD"].sum((0, 2)),
        document=None,
        initial_state=results["dinitial"],
    )
    return (gradients,)


_scan.defvjp(_scan_forward, _scan_backward)


def _states_forward(tile: Tile, inputs: KernelInputs) -> Launch:
    batch, length, heads, size = inputs.x.shape
    states = inputs.B.shape[3]
    chunks = -(-length // tile.tokens)
    return Launch(
        kernel="states_forward",
        inputs=(*_pointers(tile, inputs), inputs.initial_state),
        outputs={
            "starts": _type((batch, heads, chunks, size, states), inputs.x.dtype),
            "last": _type((batch, heads, size, states)),
        },
        grid=(heads, batch, _tiles_of_states(inputs)),
        constants=_constants(tile, inputs),
        warps=tile.warps,
    )


def _tokens_forward(tile: Tile, residuals: KernelInputs) -> Launch:
    batch, heads, chunks, _, _ = residuals.initial_state.shape
    return Launch(
        kernel="tokens_forward",
        inputs=(*_pointers(tile, residuals), residuals.initial_state),
        outputs={"y": _type(residuals.x.shape, residuals.x.dtype)},
        grid=(heads, chunks, batch),
        constants=_constants(tile, residuals),
        warps=tile.warps,
    )


def _states_backward(tile: Tile, residuals: KernelInputs, dy: Array, dlast: Array) -> Launch:
    starts = residuals.initial_state
    return Launch(
        kernel="states_backward",
        inputs=(*_pointers(tile, residuals), dy, dlast),
        outputs={"dends": _type(starts.shape, starts.dtype), "dinitial": _type(dlast.shape)},
        grid=(starts.shape[1], starts.shape[0], _tiles_of_states(residuals)),
        constants=_constants(tile, residuals),
        warps=tile.warps,
    )


def _tokens_backward(tile: Tile, residuals: KernelInputs, dy: Array, dends: Array) -> Launch:
    batch, heads, chunks, _, _ = dends.shape
    by_token = _type((batch, heads, chunks * tile.tokens))
    return Launch(
        kernel="tokens_backward",
        inputs=(*_pointers(tile, residuals), residuals.initial_state, dy, dends),
        outputs={
            "dx": _type(residuals.x.shape, residuals.x.dtype),
            "ddelta": by_token,
            "dexponents": by_token,
            "dD": _type((batch, heads, chunks)),
        },
        grid=(heads, chunks, batch),
        constants=_constants(tile, residuals),
        warps=tile.warps,
    )


def _group_sums(tile: Tile, residuals: KernelInputs, dy: Array, dends: Array) -> Launch:
    batch, _, groups, _ = residuals.B.shape
    return Launch(
        kernel="group_sums",
        inputs=(*_pointers(tile, residuals), residuals.initial_state, dy, dends),
        outputs={
            "dB": _type(residuals.B.shape, residuals.B.dtype),
            "dC": _type(residuals.C.shape, residuals.C.dtype),
        },
        grid=(dends.shape[2], _tiles_of_states(residuals), batch * groups),
        constants=_constants(tile, residuals),
        warps=tile.warps,
    )


def _pointers(tile: Tile, inputs: KernelInputs) -> tuple[Array, ...]:
    """Return the inputs of all kernels; in place of None they get x, which is then not read."""
    coarse, fine = chunk_sums(inputs.exponents, inputs.document, tile.tokens)
    tail = coarse.shape[1] - inputs.delta.shape[1]
    delta = jnp.pad(inputs.delta, ((0, 0), (0, tail), (0, 0)))
    by_token = (v.mT for v in (delta, coarse, fine))
    document = inputs.x if inputs.document is None else inputs.document
    return inputs.x, *by_token, inputs.B, inputs.C, inputs.D, document


def _constants(tile: Tile, inputs: KernelInputs) -> dict[str, Any]:
    _, length, heads, size = inputs.x.shape
    groups, states = inputs.B.shape[2:]
    return {
        "L": length,
        "H": heads,
        "G": groups,
        "P": size,
        "S": states,
        "TOKENS": tile.tokens,
        "CHANNELS": _filled(size),
        "STATES": min(_TILE_OF_STATES, _filled(states)),
        "HAS_IDS": inputs.document is not None,
    }


def _tiles_of_states(inputs: KernelInputs) -> int:
    return -(-inputs.B.shape[3] // _TILE_OF_STATES)


def _filled(size: int) -> int:
    """Return the size of a dimension filled up to a power of two."""
    return max(_MIN_SIZE, 1 << (size - 1).bit_length())


def _type(shape: tuple[int, ...], dtype: Any = _f32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def call_triton(launch: Launch, compute_capability: int | None = None) -> tuple[Array, ...]:
    """Run a kernel of `triton_kernels`, as `triton_call.call` does."""
    from kernels.ssd import triton_kernels

    return triton_call.call(triton_kernels, "ssd", launch, compute_capability)


def _choose(inputs: ScanInputs) -> Tile:
    tile = Tile(*choose_scan_tile("ssd", inputs, candidates(inputs), DEFAULT, timed))
    if tile.tokens not in (16, 32, 64, 128) or tile.warps not in (1, 2, 4, 8, 16):
        raise ValueError(
            "FLOWHN_SSD_TILE must be tokens,warps, powers of two, 16 to 128 tokens and at most 16 "
            f"warps, e.g. 64,4; got {tile.tokens},{tile.warps}"
        )
    return tile


def candidates(inputs: ScanInputs) -> list[Tile]:
    """Return the tiles to try, the same for all inputs."""
    del inputs
    return [DEFAULT, Tile(64, 4)]


def timed(tile: Sequence[int]) -> Callable[[ScanInputs], tuple[Array, Array]]:
    """Return the scan with a tile, of which `kernels.scan_tiles` times the gradients."""
    return partial(ssd_with, call_triton, Tile(*tile))
