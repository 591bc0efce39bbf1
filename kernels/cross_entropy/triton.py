"""The products of head and cross-entropy on NVIDIA GPUs, the first one as a Triton kernel.

XLA's product writes the logits in float32, and other operations read them to write the operands of
the other two products. The kernel instead writes those operands, the exponentials in hidden's
dtype, once. For the other two products cuBLAS is as fast as any kernel: the factors that turn
exponentials into gradients are the same for a whole row, and multiply the rows of the other operand
or of the result. Only the target has another factor, so its exponential is replaced. With the
logits computed again, as in the memory-efficient forms of the loss, there would be a fourth
product, a third more work, and less memory: here the exponentials of one chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels import triton_call
from kernels.checks import refused_dtype
from kernels.cross_entropy.chunks import Exponentials, Factors, Products
from kernels.triton_call import Launch, Run

_TOKENS, _WORDS, _FEATURES = 128, 256, 64  # of a program's tile, and of a step of its product


def unsupported(hidden: Array, head: Array) -> str | None:
    """Return why the kernel, or this installation, cannot run the inputs; None if it can."""
    if not hidden.size:
        return f"hidden {hidden.shape} is empty"
    return triton_call.unsupported() or refused_dtype({"hidden": hidden}, ("bfloat16",))


def products(run: Run) -> Products:
    """Return the products with this way to run the kernel."""
    return Products(partial(_exponentials, run), _gradients)


def _exponentials(
    run: Run, hidden: Array, head: Array, targets: Array, shift: Array, keep: bool
) -> Exponentials:
    (tokens, width), words = hidden.shape, head.shape[1]
    tiles = -(-words // _WORDS)
    inputs = hidden, head, targets.astype(jnp.int32), shift
    rows = jax.ShapeDtypeStruct((tiles, tokens), jnp.float32)
    outputs = {
        "exps": jax.ShapeDtypeStruct((tokens, words) if keep else (1,), hidden.dtype),
        "total": rows,
        "target": rows,
        "peak": rows,
    }
    sizes = {"N": tokens, "D": width, "V": words}
    tile = {"TOKENS": _TOKENS, "WORDS": _WORDS, "FEATURES": _FEATURES, "KEEP": keep}
    grid = (-(-tokens // _TOKENS) * tiles,)
    launch = Launch("exponentials", inputs, outputs, grid, sizes | tile, warps=8, stages=3)
    exps, total, target, peak = triton_call.execute(run, launch).values()
    return Exponentials(exps if keep else None, total.sum(0), target.sum(0), peak.max(0))


def _gradients(
    exps: Array, hidden: Array, head: Array, targets: Array, factors: Factors
) -> tuple[Array, Array]:
    tokens, words = exps.shape
    place = jnp.where(targets < 0, words, targets)  # another device's are dropped
    exps = exps.at[jnp.arange(tokens), place].set(
        (factors.of_target / factors.of_others).astype(exps.dtype),
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
    )
    of_others = (factors.scale * factors.of_others)[:, None]
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    dhead = dot((hidden * of_others).astype(hidden.dtype).T, exps)
    return of_others * dot(exps, head.T), dhead


def call_triton(launch: Launch, compute_capability: int | None = None) -> tuple[Array, ...]:
    """Run a kernel of `triton_kernels`, as `triton_call.call` does."""
    from kernels.cross_entropy import triton_kernels

    return triton_call.call(triton_kernels, "cross_entropy", launch, compute_capability)
