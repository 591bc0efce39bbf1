"""State-space duality, the sequence operation of Mamba-2 (arXiv 2405.21060, section 6)."""

from jax import Array

from kernels.backends import Backend, Operation
from kernels.checks import check_arguments, check_groups
from kernels.scan_inputs import OPTIONAL, ScanInputs, finite_rates
from kernels.sequence import scan_over_mesh
from kernels.ssd import pallas_tpu, triton, xla
from kernels.ssd.step import ssd_step

__all__ = ["OPERATION", "ssd", "ssd_step"]

# Of the fields of `ScanInputs`, and of the results.
_LAYOUTS = (
    *("B L H P", "B L H", "H", "B L G S", "B L G S", "H"),
    *("", "H", "B L", "B H P S"),  # there is no z
)
_OUT_LAYOUTS = "B L H P", "B H P S"

OPERATION = Operation(
    "ssd",
    {
        "triton": Backend(triton.ssd, ("gpu",), triton.unsupported),
        "pallas_tpu": Backend(pallas_tpu.ssd, ("tpu",), pallas_tpu.unsupported),
        "xla": Backend(xla.ssd),
    },
    {"gpu": ("triton", "xla"), "tpu": ("pallas_tpu", "xla"), "cpu": ("xla",)},
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
    """Return y of Mamba-2's scan over time, for H heads of P channels with a state [P, S] each.

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t^T
        y_t = h_t C_t + D x_t

    Each head has one decay per token, so that the sums over time are matrix products. On
    accelerators these round their operands to x's dtype, also in the gradient, and accumulate in
    float32. Decays, states and everything else are float32. Memory beyond inputs and outputs is one
    chunk's matrices and, if it is differentiated (by Triton in any case), the state at each chunk's
    start, which the kernels keep in x's dtype.

    Args:
      x: inputs [B, L, H, P], any float dtype, any length L >= 1.
      dt: time steps before the softplus, [B, L, H].
      A: [H], negative, float32; -inf forgets the state at every token.
      B: [B, L, G, S], for G groups of H / G consecutive heads each.
      C: [B, L, G, S].
      D: skip, [H]; None: zero.
      dt_bias: [H]; None: zero.
      segment_ids: documents, [B, L], integer; as in the selective scan.
      initial_state: h before position 0, [B, H, P, S] float32, of the document of position 0. None:
        zero.
      return_final_state: whether to also return h after position L-1.
      backend: 'triton' (NVIDIA), 'pallas_tpu' or 'xla'; None: see `kernels.backends`.

    Returns:
      y [B, L, H, P] in x's dtype, or (y, final state [B, H, P, S] float32) with
      `return_final_state`. Differentiable as the selective scan is.

    Raises:
      ValueError: a dtype is not as above, an array is empty, shapes do not match each other, H is
        not a multiple of G, or `backend` is unknown or cannot run them.
    """
    inputs = ScanInputs(x, dt, A, B, C, D, None, dt_bias, segment_ids, initial_state)
    sizes = check_arguments(
        "ssd", inputs._asdict(), _LAYOUTS, optional=OPTIONAL, integers=("segment_ids",)
    )
    check_groups("ssd", sizes["H"], sizes["G"])
    inputs = inputs._replace(A=finite_rates(A))
    run = OPERATION.choose(inputs, backend=backend)
    # One group belongs to all heads; several are sharded over devices with their heads.
    layouts = [layout.replace("G", "1") if sizes["G"] == 1 else layout for layout in _LAYOUTS]
    y, state = scan_over_mesh(run, inputs, layouts, _OUT_LAYOUTS)
    return (y, state) if return_final_state else y
