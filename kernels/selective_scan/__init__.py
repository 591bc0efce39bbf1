"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2)."""

from functools import partial

import jax.numpy as jnp
from jax import Array

from kernels.backends import Backend, Operation
from kernels.checks import check_arguments
from kernels.decay import finite_rates
from kernels.partition import over_mesh
from kernels.selective_scan import pallas_tpu, triton, xla
from kernels.selective_scan.step import selective_scan_step
from kernels.sequence import over_sequence

__all__ = ["OPERATION", "selective_scan", "selective_scan_step"]

_LAYOUTS = ("B L E", "B L E", "E S", "B L S", "B L S", "E", "B L E", "E", "B L", "B E S")
_OUT_LAYOUTS = "B L E", "B E S"


OPERATION = Operation(
    "selective_scan",
    {
        "triton": Backend(triton.selective_scan, ("gpu",), triton.unsupported),
        "pallas_tpu": Backend(pallas_tpu.selective_scan, ("tpu",), pallas_tpu.unsupported),
        "xla_associative": Backend(partial(xla.selective_scan, form="associative")),
        "xla_sequential": Backend(partial(xla.selective_scan, form="sequential")),
    },
    {
        "gpu": ("triton", "xla_associative"),
        "tpu": ("pallas_tpu", "xla_associative"),
        "cpu": ("xla_sequential",),
    },
)


def selective_scan(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    segment_ids: Array | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    *,
    backend: str | None = None,
) -> Array | tuple[Array, Array]:
    """Run the selective scan over time, for each of E channels with a state of S numbers.

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    All arithmetic is float32. Memory beyond inputs and outputs is that of one chunk's states and,
    where it is differentiated, of the state at each chunk's start.

    Args:
      u: inputs [B, L, E], any float dtype, any length L >= 1.
      dt: time steps before the softplus, [B, L, E].
      A: [E, S], negative, float32; -inf forgets the state at every token.
      B: [B, L, S].
      C: [B, L, S].
      D: [E]; None: zero, no skip.
      z: gate before the silu, [B, L, E]; None: no gate.
      dt_bias: [E]; None: zero.
      segment_ids: documents, [B, L], integer: h_{t-1} counts as zero at each position whose id
        differs from the one before; None: one document.
      initial_state: h before position 0, [B, E, S] float32; it belongs to the document of
        position 0. None: zero.
      return_final_state: whether to return h after position L-1 as well.
      backend: 'triton' (NVIDIA), 'pallas_tpu', 'xla_associative' or 'xla_sequential'; None: see
        `kernels.backends`.

    Returns:
      y [B, L, E] in u's dtype or, where asked, (y, final state [B, E, S] float32). Differentiable
      in all float arguments, also through the final state; only in reverse mode, once.

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other, or
        `backend` is unknown or cannot serve.
    """
    required = {
        "u": (u, "B L E"),
        "dt": (dt, "B L E"),
        "A": (A, "E S"),
        "B": (B, "B L S"),
        "C": (C, "B L S"),
    }
    optional = {
        "D": (D, "E"),
        "z": (z, "B L E"),
        "dt_bias": (dt_bias, "E"),
        "segment_ids": (segment_ids, "B L"),
        "initial_state": (initial_state, "B E S"),
    }
    check_arguments("selective_scan", required, optional, integers=("segment_ids",))
    A = finite_rates(A)
    D = jnp.zeros(A.shape[0], jnp.float32) if D is None else D
    arguments = u, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state
    run = OPERATION.choose(*arguments, backend=backend)
    local = partial(over_sequence, run)
    y, state = over_mesh(local, _LAYOUTS, _OUT_LAYOUTS, meets="L")(*arguments)
    return (y, state) if return_final_state else y
