"""One token of the selective scan, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments
from kernels.scan_inputs import OPTIONAL, finite_rates, time_steps


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
    """Return y and the next state of one step of `kernels.selective_scan.selective_scan`.

    The formulas in float32; XLA fuses them into one pass over the state.

    Args:
      u: inputs [B, E], any float dtype.
      dt: time steps before the softplus, [B, E].
      A: [E, S], negative, float32; -inf forgets the state.
      B: [B, S].
      C: [B, S].
      D: skip, [E]; None: zero.
      state: h before the token, [B, E, S] float32.
      z: gate before the silu, [B, E]; None: no gate.
      dt_bias: [E]; None: zero.

    Returns:
      (y [B, E] in u's dtype, the state after the token [B, E, S] float32).

    Raises:
      ValueError: a dtype is not as above, an array is empty or shapes do not match each other.
    """
    check_arguments(
        "selective_scan_step",
        dict(u=u, dt=dt, A=A, B=B, C=C, state=state, D=D, z=z, dt_bias=dt_bias),
        ("B E", "B E", "E S", "B S", "B S", "B E S", "E", "B E", "E"),
        optional=OPTIONAL,
    )
    dtype, f32 = u.dtype, jnp.float32
    u, A, B, C, state = (x.astype(f32) for x in (u, finite_rates(A), B, C, state))
    delta = time_steps(dt, dt_bias)
    state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
    y = (state * C[:, None, :]).sum(-1)
    if D is not None:
        y = y + D.astype(f32) * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(f32))
    return y.astype(dtype), state
