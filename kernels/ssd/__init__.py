"""State-space duality, the sequence operation of Mamba-2 (arXiv 2405.21060, section 6)."""

from functools import partial

import jax.numpy as jnp
from jax import Array

from kernels.backends import Backend, Operation
from kernels.checks import check_arguments
from kernels.decay import finite_rates
from kernels.partition import over_mesh
from kernels.sequence import over_sequence
from kernels.ssd import xla
from kernels.ssd.step import ssd_step

__all__ = ["OPERATION", "ssd", "ssd_step"]

OPERATION = Operation(
    "ssd",
    {"xla": Backend(xla.ssd)},
    {"gpu": ("xla",), "tpu": ("xla",), "cpu": ("xla",)},
)


def ssd(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None = None,
    segment_ids: Array | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """Run Mamba-2's scan over time, for H heads of P channels with P x S numbers of state each.

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Each head has one decay a token, so that the sums over time are matrix products. On accelerators
    those round their operands to x's dtype, also in the gradient; they accumulate in float32.
    Decays, states and all else are float32. Memory beyond inputs and outputs is that of one chunk's
    matrices and, where it is differentiated, of the state at each chunk's start.

    Args:
      x: inputs [B, L, H, P], any float dtype, any length L >= 1.
      dt: time steps before the softplus, [B, L, H].
      A: [H], negative, float32; -inf forgets the state at every token.
      B: [B, L, G, S], of G groups of H / G consecutive heads.
      C: [B, L, G, S].
      D: [H]; None: zero, no skip.
      dt_bias: [H]; None: zero.
      segment_ids: documents, [B, L], integer: h_{t-1} counts as zero at each position whose id
        differs from the one before; None: one document.
      initial_state: h before position 0, [B, H, P, S] float32; it belongs to the document of
        position 0. None: zero.
      return_final_state: whether to return h after position L-1 as well.
      backend: 'xla'; None: see `kernels.backends`.

    Returns:
      y [B, L, H, P] in x's dtype or, where asked, (y, final state [B, H, P, S] float32).
      Differentiable in all float arguments, also through the final state; only in reverse mode,
      once.

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other, the
        groups do not divide the heads, or `backend` is unknown or cannot serve.
    """
    required = {
        "x": (x, "B L H P"),
        "dt": (dt, "B L H"),
        "A": (A, "H"),
        "B": (B, "B L G S"),
        "C": (C, "B L G S"),
    }
    optional = {
        "D": (D, "H"),
        "dt_bias": (dt_bias, "H"),
        "segment_ids": (segment_ids, "B L"),
        "initial_state": (initial_state, "B H P S"),
    }
    sizes = check_arguments("ssd", required, optional, integers=("segment_ids",))
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"ssd: {sizes['H']} heads do not divide into {sizes['G']} groups")
    A = finite_rates(A)
    D = jnp.zeros(A.shape[0], jnp.float32) if D is None else D
    arguments = x, dt, A, B, C, D, dt_bias, segment_ids, initial_state
    run = OPERATION.choose(*arguments, backend=backend)
    # One group is all heads'; several are cut over devices with their heads.
    groups = "B L 1 S" if sizes["G"] == 1 else "B L G S"
    layouts = "B L H P", "B L H", "H", groups, groups, "H", "H", "B L", "B H P S"
    local = partial(over_sequence, run)
    y, state = over_mesh(local, layouts, ("B L H P", "B H P S"), meets="L")(*arguments)
    return (y, state) if return_final_state else y
