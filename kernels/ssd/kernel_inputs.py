"""What the Pallas and Triton kernels of state-space duality get in place of the inputs.

Their decays are powers of two, and their sums of log-decays are computed by XLA, which is a small
part of the work: see `kernels.ssd.decays`.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels.scan_inputs import ScanInputs, float32_or_zeros, time_steps
from kernels.ssd.decays import LEAST_EXPONENT, document_sums, number_documents

LN_2 = math.log(2)  # the derivative of 2**e is LN_2 * 2**e


class KernelInputs(NamedTuple):
    """The inputs, with time steps and log-decays in place of dt, dt_bias and A."""

    x: Array  # [B, L, H, P], bfloat16 or float32
    delta: Array  # [B, L, H], float32
    exponents: Array  # log2 of each token's decay, [B, L, H], float32
    B: Array  # [B, L, G, S], bfloat16 or float32
    C: Array  # [B, L, G, S], bfloat16 or float32
    D: Array  # [H], float32
    document: Array | None  # [B, L to a multiple of the chunk], int32: 0, 1, ... in each chunk
    initial_state: Array  # [B, H, P, S], float32


def kernel_inputs(inputs: ScanInputs, chunk: int) -> KernelInputs:
    """Return the kernels' inputs, of which `jax.grad` leads back to the scan's."""
    batch, length, heads, size = inputs.x.shape
    delta = time_steps(inputs.dt, inputs.dt_bias)
    exponents = delta * (inputs.A.astype(jnp.float32) / LN_2)
    document = None
    if inputs.segment_ids is not None:
        document = number_documents(inputs.segment_ids, chunk, length + -length % chunk)
    state_shape = batch, heads, size, inputs.B.shape[3]
    return KernelInputs(
        x=inputs.x,
        delta=delta,
        exponents=jnp.maximum(exponents, LEAST_EXPONENT),
        B=inputs.B,
        C=inputs.C,
        D=float32_or_zeros(inputs.D, (heads,)),
        document=document,
        initial_state=float32_or_zeros(inputs.initial_state, state_shape),
    )


def chunk_sums(exponents: Array, document: Array | None, chunk: int) -> tuple[Array, Array]:
    """Return the two sums of `document_sums` in each chunk, [B, L to a multiple of it, H].

    Tokens past the end have a log-decay of 0.

    Args:
      exponents: [B, L, H].
      document: as in `KernelInputs`.
      chunk: tokens of a chunk.
    """
    batch, length, heads = exponents.shape
    tail = -length % chunk
    exponents = jnp.pad(exponents, ((0, 0), (0, tail), (0, 0))).reshape(-1, chunk, heads)
    if document is not None:
        document = document.reshape(-1, chunk)
    coarse, fine = document_sums(exponents, document)
    shape = batch, length + tail, heads
    return coarse.reshape(shape), fine.reshape(shape)
