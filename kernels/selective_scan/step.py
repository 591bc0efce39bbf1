"""One token of the selective scan, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments
from kernels.decay import finite_rates


def selective_scan_step(
    u: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    state: Array,
    z: Array | None = None,
    dt_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Advance the scan of `kernels.selective_scan.selective_scan` by one token.

    The same formulas in float32 as plain XLA, which makes one pass over the state of them.

    Args:
      u: inputs [B, E], any float dtype.
      dt: time steps before the softplus, [B, E].
      A: [E, S], negative, float32; -inf forgets the state.
      B: [B, S].
      C: [B, S].
      D: [E]; None: zero, no skip.
      state: h before the token, [B, E, S] float32.
      z: gate before the silu, [B, E]; None: no gate.
      dt_bias: [E]; None: zero.

    Returns:
      (y [B, E] in u's dtype, the state after the token [B, E, S] float32).

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other.
    """
    required = {
        "u": (u, "B E"),
        "dt": (dt, "B E"),
        "A": (A, "E S"),
        "B": (B, "B S"),
        "C": (C, "B S"),
        "state": (state, "B E S"),
    }
    optional = {"D": (D, "E"), "z": (z, "B E"), "dt_bias": (dt_bias, "E")}
    check_arguments("selective_scan_step", required, optional)
    dtype, f32 = u.dtype, jnp.float32
    u, dt, A, B, C, state = (x.astype(f32) for x in (u, dt, finite_rates(A), B, C, state))
    delta = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(f32))
    state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
    y = (state * C[:, None, :]).sum(-1)
    if D is not None:
        y = y + D.astype(f32) * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return y.astype(dtype), state
