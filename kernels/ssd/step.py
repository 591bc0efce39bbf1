"""One token of the state-space duality, for decoding."""

import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments, check_groups
from kernels.scan_inputs import OPTIONAL, finite_rates, time_steps


def ssd_step(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    state: Array,
    dt_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Return y and the next state of one step of `kernels.ssd.ssd`, by the recurrence in float32.

    Args:
      x: inputs [B, H, P], any float dtype.
      dt: time steps before the softplus, [B, H].
      A: [H], negative, float32; -inf forgets the state.
      B: [B, G, S], for G groups of H / G consecutive heads each.
      C: [B, G, S].
      D: skip, [H]; None: zero.
      state: h before the token, [B, H, P, S] float32.
      dt_bias: [H]; None: zero.

    Returns:
      (y [B, H, P] in x's dtype, the state after the token [B, H, P, S] float32).

    Raises:
      ValueError: a dtype is not as above, an array is empty, shapes do not match each other, or H
        is not a multiple of G.
    """
    sizes = check_arguments(
        "ssd_step",
        dict(x=x, dt=dt, A=A, B=B, C=C, state=state, D=D, dt_bias=dt_bias),
        ("B H P", "B H", "H", "B G S", "B G S", "B H P S", "H", "H"),
        optional=OPTIONAL,
    )
    check_groups("ssd_step", sizes["H"], sizes["G"])
    dtype, f32 = x.dtype, jnp.float32
    x, A, state = (v.astype(f32) for v in (x, finite_rates(A), state))
    heads_of_group = sizes["H"] // sizes["G"]
    B, C = (jnp.repeat(v.astype(f32), heads_of_group, axis=1)[:, :, None] for v in (B, C))
    delta = time_steps(dt, dt_bias)
    decay = jnp.exp(delta * A)[..., None, None]
    state = decay * state + (delta[..., None] * x)[..., None] * B
    y = (state * C).sum(-1)
    if D is not None:
        y = y + D.astype(f32)[:, None] * x
    return y.astype(dtype), state
