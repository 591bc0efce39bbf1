"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2)."""

from functools import partial

from jax import Array

from kernels.backends import Backend, Operation
from kernels.checks import check_arguments
from kernels.scan_inputs import OPTIONAL, ScanInputs, finite_rates
from kernels.selective_scan import pallas_tpu, triton, xla
from kernels.selective_scan.step import selective_scan_step
from kernels.sequence import scan_over_mesh

__all__ = ["OPERATION", "selective_scan", "selective_scan_step"]

# Names and layouts of the fields of `ScanInputs`, and layouts of the results.
_NAMES = "u", *ScanInputs._fields[1:]
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
    """Return y of the selective scan over time, for E channels with a state of S numbers each.

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t
        y_t = (C_t . h_t + D u_t) * silu(z_t)

    All arithmetic is float32. Memory beyond inputs and outputs is one chunk's states and, if it is
    differentiated, the state at each chunk's start.

    Args:
      u: inputs [B, L, E], any float dtype, any length L >= 1.
      dt: time steps before the softplus, [B, L, E].
      A: [E, S], negative, float32; -inf forgets the state at every token.
      B: [B, L, S].
      C: [B, L, S].
      D: skip, [E]; None: zero.
      z: gate before the silu, [B, L, E]; None: no gate.
      dt_bias: [E]; None: zero.
      segment_ids: documents, [B, L], integer: where the id differs from that of the previous
        position, h_{t-1} counts as zero. None: one document.
      initial_state: h before position 0, [B, E, S] float32, of the document of position 0. None:
        zero.
      return_final_state: whether to also return h after position L-1.
      backend: 'triton' (NVIDIA), 'pallas_tpu', 'xla_associative' or 'xla_sequential'; None: see
        `kernels.backends`.

    Returns:
      y [B, L, E] in u's dtype, or (y, final state [B, E, S] float32) with `return_final_state`.
      Differentiable once, in reverse mode, in all float arguments and through the final state.

    Raises:
      ValueError: a dtype is not as above, an array is empty, shapes do not match each other, or
        `backend` is unknown or cannot run them.
    """
    inputs = ScanInputs(u, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state)
    arrays = dict(zip(_NAMES, inputs, strict=True))
    check_arguments(
        "selective_scan", arrays, _LAYOUTS, optional=OPTIONAL, integers=("segment_ids",)
    )
    inputs = inputs._replace(A=finite_rates(A))
    run = OPERATION.choose(inputs, backend=backend)
    y, state = scan_over_mesh(run, inputs, _LAYOUTS, _OUT_LAYOUTS)
    return (y, state) if return_final_state else y
