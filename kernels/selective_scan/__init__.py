"""The selective scan of Mamba-1 (arXiv 2312.00752, section 3.2 and algorithm 2)."""

from functools import partial

import jax
from jax import Array

from kernels.checks import check_shapes
from kernels.selective_scan import xla

_BACKENDS = {
    "xla_associative": partial(xla.selective_scan, form="associative"),
    "xla_sequential": partial(xla.selective_scan, form="sequential"),
}


def selective_scan(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
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
      A: [E, S], negative, float32.
      B: [B, L, S].
      C: [B, L, S].
      D: [E].
      z: gate before the silu, [B, L, E]; None: no gate.
      dt_bias: [E]; None: zero.
      segment_ids: documents, [B, L], integer: h_{t-1} counts as zero at each position whose id
        differs from the one before; None: one document.
      initial_state: h before position 0, [B, E, S] float32; it belongs to the document of
        position 0. None: zero.
      return_final_state: whether to return h after position L-1 as well.
      backend: 'xla_associative' or 'xla_sequential'; None: sequential on a CPU, else associative.

    Returns:
      y [B, L, E] in u's dtype or, where asked, (y, final state [B, E, S] float32). Differentiable
      in all float arguments, also through the final state; only in reverse mode, once.

    Raises:
      ValueError: if shapes do not fit each other or the backend is unknown.
    """
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"selective_scan: u must be [B, L, E] and A [E, S], found shapes {u.shape}, {A.shape}"
        )
    sizes = dict(zip("BLE", u.shape, strict=True)) | {"S": A.shape[1]}
    arrays = {
        "dt": (dt, "B L E"),
        "A": (A, "E S"),
        "B": (B, "B L S"),
        "C": (C, "B L S"),
        "D": (D, "E"),
        "z": (z, "B L E"),
        "dt_bias": (dt_bias, "E"),
        "segment_ids": (segment_ids, "B L"),
        "initial_state": (initial_state, "B E S"),
    }
    check_shapes("selective_scan", sizes, arrays)
    if backend is None:
        backend = "xla_sequential" if jax.default_backend() == "cpu" else "xla_associative"
    if backend not in _BACKENDS:
        accepted = ", ".join(map(repr, sorted(_BACKENDS)))
        raise ValueError(f"selective_scan: unknown backend {backend!r}; accepted: {accepted}")
    run = _BACKENDS[backend]
    y, state = run(u, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state)
    return (y, state) if return_final_state else y
