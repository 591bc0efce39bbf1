"""State-space duality on TPUs: calls of its two Pallas kernels, forward and backward.

The kernels read x once and write y once, in their own dtype; the T x T matrices of a chunk stay in
VMEM, and so do the states between the chunks. When the scan is differentiated, the forward kernel
also saves the state before each chunk in x's dtype, to which products round it in any case.

The grid is (sequences, parts, chunks, blocks). A part is a group, or as many of its heads as have
states that fit in VMEM; a block is the heads of a part that one grid step works on. Over the blocks
of a part the gradients of B and C are summed in VMEM, over the parts of a group by XLA.

Inside this file heads and their channels are one dimension of H P, groups and states one of G S.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.checks import refused_dtype
from kernels.custom_vjp import custom_vjp, kept_by_remat
from kernels.manual_axes import vary_alike
from kernels.pallas_scan import WALK, arrays_and_blocks, like, moved_bytes
from kernels.scan_inputs import ScanInputs
from kernels.ssd import pallas_tpu_kernels as kernels
from kernels.ssd.kernel_inputs import LN_2, KernelInputs, chunk_sums, kernel_inputs
from kernels.ssd.pallas_tpu_kernels import CHUNK, SUBLANES, Gradients, Inputs, Results, Scratch

_DTYPES = ("bfloat16", "float32")
_LANES = 128
_ROWS = 16  # of a bfloat16 register
_MAX_SIZE, _MAX_STATES = 256, 256
# With these a float32 backward kernel with 256 states fits in the 16 MiB of VMEM of a TPU v4.
_MAX_HEADS, _BLOCK_CHANNELS = 8, 512  # of a block
_STATE_BYTES = 2**22  # of a part


class _Sizes(NamedTuple):
    """How the heads are divided, and their padded sizes."""

    heads: int
    groups: int
    size: int  # channels of a head
    states: int
    block: int  # heads of a block
    blocks: int  # of a part
    parts: int

    @property
    def rows(self) -> int:
        """Heads of a block, filled up to whole registers."""
        return self.block + -self.block % SUBLANES


def unsupported(inputs: ScanInputs) -> str | None:
    """Return why the kernels cannot run the inputs; None if they can."""
    size, states = inputs.x.shape[3], inputs.B.shape[3]
    if size > _MAX_SIZE or states > _MAX_STATES:
        return (
            f"it has {size} channels per head and {states} states, more than {_MAX_SIZE} and "
            f"{_MAX_STATES}"
        )
    return refused_dtype(dict(x=inputs.x, B=inputs.B, C=inputs.C), _DTYPES)


def ssd(inputs: ScanInputs, *, interpret: bool = False) -> tuple[Array, Array]:
    """Return the (y, final state) of `kernels.ssd.ssd`, computed by the TPU kernels.

    Args:
      inputs: the inputs of the scan.
      interpret: whether to interpret the kernels, which is slow, but works on any platform.
    """
    batch, length, heads, size = inputs.x.shape
    groups, states = inputs.B.shape[2:]
    sizes = _sizes(heads, groups, size, states)
    # Padded channels and states have inputs, B and C of zero, and so states of zero.
    channels, more_states = (0, sizes.size - size), (0, sizes.states - states)

    def pad_minor(v: Array, *minor: tuple[int, int]) -> Array:
        return jnp.pad(v, (*((0, 0),) * (v.ndim - len(minor)), *minor))

    given = kernel_inputs(inputs, CHUNK)
    flat = given._replace(
        x=pad_minor(given.x, channels).reshape(batch, length, -1),
        B=pad_minor(given.B, more_states).reshape(batch, length, -1),
        C=pad_minor(given.C, more_states).reshape(batch, length, -1),
        initial_state=pad_minor(given.initial_state, channels, more_states).reshape(
            batch, -1, sizes.states
        ),
    )
    y, state = _scan(interpret, sizes, vary_alike(flat))
    y = y.reshape(batch, length, heads, sizes.size)[..., :size]
    return y, state.reshape(batch, heads, sizes.size, -1)[:, :, :size, :states]


def _sizes(heads: int, groups: int, size: int, states: int) -> _Sizes:
    """Return the largest blocks, of up to 8 heads, among those that need the least padding."""
    heads_of_group = heads // groups
    states += -states % _LANES

    def padded(block: int) -> int:
        return size + -size % math.lcm(_ROWS, _LANES // math.gcd(block, _LANES))

    def fits(block: int) -> bool:
        whole = heads_of_group % block == 0
        return whole and (block == 1 or block * padded(block) <= _BLOCK_CHANNELS)

    blocks = filter(fits, range(1, _MAX_HEADS + 1))
    block = min(blocks, key=lambda block: (padded(block), -block))
    of_group = heads_of_group // block
    bytes_of_block = 4 * block * padded(block) * states
    blocks_of_part = next(
        n
        for n in range(of_group, 0, -1)
        if of_group % n == 0 and (n == 1 or n * bytes_of_block <= _STATE_BYTES)
    )
    return _Sizes(
        heads=heads,
        groups=groups,
        size=padded(block),
        states=states,
        block=block,
        blocks=blocks_of_part,
        parts=groups * of_group // blocks_of_part,
    )


@custom_vjp(nondiff_argnums=(0, 1))
def _scan(interpret: bool, sizes: _Sizes, inputs: KernelInputs) -> tuple[Array, Array]:
    """Return y [B, L, H P] in x's dtype and the last state [B, H P, S]."""
    y, state, _ = _call_forward(interpret, sizes, inputs, save_starts=False)
    return y, state


def _scan_forward(interpret: bool, sizes: _Sizes, inputs: KernelInputs) -> tuple[Any, Any]:
    """Return the results, and the inputs with the states before the chunks for the initial."""
    results = _call_forward(interpret, sizes, inputs, save_starts=True)
    y, state, starts = kept_by_remat(results)
    return (y, state), inputs._replace(initial_state=starts)


def _scan_backward(
    interpret: bool, sizes: _Sizes, residuals: KernelInputs, cotangents: Any
) -> tuple[KernelInputs]:
    grads = _call_backward(interpret, sizes, residuals, *cotangents)
    batch, length, _ = residuals.x.shape

    def by_token(rows: Array) -> Array:
        """Return rows [B, blocks, R, L] as [B, L, H]."""
        rows = rows[:, :, : sizes.block, :length].reshape(batch, sizes.heads, length)
        return rows.mT

    def over_parts(sums: Array, like: Array) -> Array:
        """Return sums [B, L, parts S] over the parts of each group."""
        sums = sums.reshape(batch, length, sizes.groups, -1, sizes.states).sum(3)
        return sums.reshape(like.shape).astype(like.dtype)

    gradients = KernelInputs(
        x=grads.x,
        delta=by_token(grads.delta),
        exponents=LN_2 * by_token(grads.exponents),
        B=over_parts(grads.B, residuals.B),
        C=over_parts(grads.C, residuals.C),
        D=by_token(grads.D).sum((0, 1)),
        document=None,
        initial_state=grads.initial_state,
    )
    return (gradients,)


_scan.defvjp(_scan_forward, _scan_backward)


class _Specs:
    """The blocks of the grid."""

    def __init__(self, sizes: _Sizes, inputs: KernelInputs, *, reverse: bool):
        batch, length, _ = inputs.x.shape
        chunks = pl.cdiv(length, CHUNK)
        channels, states = sizes.block * sizes.size, sizes.states

        def chunk(t: Any) -> Any:
            return chunks - 1 - t if reverse else t

        def block(part: Any, n: Any) -> Any:
            return part * sizes.blocks + n

        def spec(shape: Any, index: Any) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda b, g, t, n: index(b, g, chunk(t), n))

        def state_at(step: int, others: int) -> pl.BlockSpec:
            """Return blocks that change only in one step of the walk over the chunks."""

            def index(b: Any, g: Any, t: Any, n: Any) -> Any:
                return b, block(g, jnp.where(t == step, n, others)), 0

            return pl.BlockSpec((None, channels, states), index)

        parts_of_group = sizes.parts // sizes.groups
        self.grid = batch, sizes.parts, chunks, sizes.blocks
        self.channels = spec((None, CHUNK, channels), lambda b, g, t, n: (b, t, block(g, n)))
        self.rows = spec((None, None, sizes.rows, CHUNK), lambda b, g, t, n: (b, block(g, n), 0, t))
        self.starts = spec(
            (None, None, channels, states), lambda b, g, t, n: (b, t, block(g, n), 0)
        )
        self.state_in = state_at(0, sizes.blocks - 1)
        self.state_out = state_at(chunks - 1, 0)
        self.sums = spec((None, CHUNK, states), lambda b, g, t, n: (b, t, g))
        self.columns = spec(
            (None, CHUNK, states), lambda b, g, t, n: (b, t, jax.lax.div(g, parts_of_group))
        )
        self.skip = spec((None, sizes.rows, CHUNK), lambda b, g, t, n: (block(g, n), 0, 0))
        self.document = spec((None, 1, CHUNK), lambda b, g, t, n: (b, 0, t))


def _arrange(specs: _Specs, sizes: _Sizes, inputs: KernelInputs) -> Inputs:
    """Return the kernels' inputs with their blocks; values per head and token [B, blocks, R, L]."""
    coarse, fine = chunk_sums(inputs.exponents, inputs.document, CHUNK)
    batch, length, _ = coarse.shape
    more_heads = (0, sizes.rows - sizes.block)

    def rows(v: Array) -> Array:
        v = jnp.pad(v, ((0, 0), (0, length - v.shape[1]), (0, 0)))
        v = v.mT.reshape(batch, -1, sizes.block, length)
        return jnp.pad(v, ((0, 0), (0, 0), more_heads, (0, 0)))

    D = jnp.pad(inputs.D.reshape(-1, sizes.block, 1), ((0, 0), more_heads, (0, 0)))
    document = None
    if inputs.document is not None:
        document = inputs.document.astype(jnp.float32)[:, None], specs.document
    return Inputs(
        x=(inputs.x, specs.channels),
        delta=(rows(inputs.delta), specs.rows),
        coarse=(rows(coarse), specs.rows),
        fine=(rows(fine), specs.rows),
        B=(inputs.B, specs.columns),
        C=(inputs.C, specs.columns),
        D=(jnp.broadcast_to(D, (*D.shape[:2], CHUNK)), specs.skip),
        document=document,
    )


def _call_forward(
    interpret: bool, sizes: _Sizes, inputs: KernelInputs, *, save_starts: bool
) -> Results:
    """Return y, the last state and, with `save_starts`, the states before the chunks."""
    specs = _Specs(sizes, inputs, reverse=False)
    h0 = inputs.initial_state
    starts = like(h0, (h0.shape[0], specs.grid[2], *h0.shape[1:]), inputs.x.dtype)
    return _call(
        kernels.forward,
        specs,
        sizes,
        _arrange(specs, sizes, inputs),
        ((h0, specs.state_in),),
        Results(
            y=(like(inputs.x), specs.channels),
            final_state=(like(h0), specs.state_out),
            starts=(starts, specs.starts) if save_starts else None,
        ),
        length=inputs.x.shape[1],
        products=(2, 1),
        interpret=interpret,
        name="ssd_forward",
    )


def _call_backward(
    interpret: bool, sizes: _Sizes, residuals: KernelInputs, dy: Array, dh_final: Array
) -> Gradients:
    specs = _Specs(sizes, residuals, reverse=True)
    batch, length, _ = residuals.x.shape
    arranged = _arrange(specs, sizes, residuals)
    rows = like(arranged.delta[0]), specs.rows
    sums = like(dh_final, (batch, length, sizes.parts * sizes.states)), specs.sums
    return _call(
        kernels.backward,
        specs,
        sizes,
        arranged,
        (
            (residuals.initial_state, specs.starts),
            (dy, specs.channels),
            (dh_final, specs.state_in),
        ),
        Gradients(
            x=(like(residuals.x), specs.channels),
            delta=rows,
            exponents=rows,
            B=sums,
            C=sums,
            D=rows,
            initial_state=(like(dh_final), specs.state_out),
        ),
        length=length,
        products=(5, 3),
        interpret=interpret,
        name="ssd_backward",
    )


def _call(
    kernel: Any,
    specs: _Specs,
    sizes: _Sizes,
    inputs: Inputs,
    others: tuple[tuple[Array, pl.BlockSpec], ...],
    results: Any,
    *,
    length: int,
    products: tuple[int, int],
    **options: Any,
) -> Any:
    """Call a kernel.

    Args:
      kernel: the kernel of `pallas_tpu_kernels`.
      specs: blocks of its grid.
      sizes: see `_Sizes`.
      inputs: with their blocks; see `arrays_and_blocks`.
      others: its further arguments, with their blocks.
      results: types of the results that this function returns, with their blocks.
      length: tokens of a sequence.
      products: those per head of channels with states, and of channels with a chunk's tokens.
      **options: further ones of `pallas_call`.
    """
    inputs, input_blocks = arrays_and_blocks(inputs)
    others, other_blocks = arrays_and_blocks(others)
    types, blocks = arrays_and_blocks(results)
    channels = sizes.block * sizes.size
    (arrays,) = pl.pallas_call(
        partial(kernel, length=length, size=sizes.size),
        grid=specs.grid,
        in_specs=(input_blocks, *other_blocks),
        out_shape=(types,),
        out_specs=(blocks,),
        scratch_shapes=(
            Scratch(
                states=pltpu.VMEM((sizes.blocks, channels, sizes.states), jnp.float32),
                scores=pltpu.VMEM((CHUNK, CHUNK), jnp.float32),
                mask=pltpu.VMEM((CHUNK, CHUNK), jnp.float32),
            ),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * inputs.x.size * (products[0] * sizes.states + products[1] * CHUNK),
            transcendentals=inputs.delta.size * CHUNK,
            bytes_accessed=moved_bytes((inputs, others, types)),
        ),
        compiler_params=WALK,
        **options,
    )(inputs, *others)
    return arrays
