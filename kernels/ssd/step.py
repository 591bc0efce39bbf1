"""One token of the state-space duality, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments
from kernels.decay import finite_rates


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
    """Advance the recurrence of `kernels.ssd.ssd` by one token.

    The recurrence itself, all in float32.

    Args:
      x: inputs [B, H, P], any float dtype.
      dt: time steps before the softplus, [B, H].
      A: [H], negative, float32; -inf forgets the state.
      B: [B, G, S], of G groups of H / G consecutive heads.
      C: [B, G, S].
      D: [H]; None: zero, no skip.
      state: h before the token, [B, H, P, S] float32.
      dt_bias: [H]; None: zero.

    Returns:
      (y [B, H, P] in x's dtype, the state after the token [B, H, P, S] float32).

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other, or
        the groups do not divide the heads.
    """
    required = {
        "x": (x, "B H P"),
        "dt": (dt, "B H"),
        "A": (A, "H"),
        "B": (B, "B G S"),
        "C": (C, "B G S"),
        "state": (state, "B H P S"),
    }
    optional = {"D": (D, "H"), "dt_bias": (dt_bias, "H")}
    sizes = check_arguments("ssd_step", required, optional)
    if sizes["H"] % sizes["G"]:
        raise ValueError(f"ssd_step: {sizes['H']} heads are not {sizes['G']} equal groups")
    dtype, f32 = x.dtype, jnp.float32
    x, dt, A, state = (v.astype(f32) for v in (x, dt, finite_rates(A), state))
    heads_of_group = sizes["H"] // sizes["G"]
    B, C = (jnp.repeat(v.astype(f32), heads_of_group, axis=1)[:, :, None] for v in (B, C))
    delta = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(f32))
    decay = jnp.exp(delta * A)[..., None, None]
    state = decay * state + (delta[..., None] * x)[..., None] * B
    y = (state * C).sum(-1)
    if D is not None:
        y = y + D.astype(f32)[:, None] * x
    return y.astype(dtype), state
