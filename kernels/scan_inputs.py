"""The inputs of the two state-space scans, and what every backend does with them first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Far enough from the largest float32 that its products with gradients are finite. Any time step
# above 1e-28 decays a state to zero.
_LEAST_RATE = -1e30


class ScanInputs(NamedTuple):
    """The arrays of a state-space scan.

    `kernels.selective_scan.selective_scan`, where x is named u, and `kernels.ssd.ssd` describe
    them.
    """

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None = None  # of the selective scan only
    dt_bias: Array | None = None
    segment_ids: Array | None = None
    initial_state: Array | None = None


OPTIONAL = ("D", "z", "dt_bias", "segment_ids", "initial_state")


def finite_rates(A: Array) -> Array:
    """Return A in float32, with every rate below `_LEAST_RATE`, such as -inf, raised to it.

    Then -inf has the results and gradients of the limit: the state is forgotten at every token, the
    gradient of A is 0, and a time step of 0 keeps the state. In the formulas themselves, 0 * -inf
    is NaN.
    """
    return jnp.maximum(jnp.asarray(A, jnp.float32), _LEAST_RATE)


def time_steps(dt: Array, dt_bias: Array | None) -> Array:
    """Return softplus(dt + dt_bias) in float32."""
    dt = dt.astype(jnp.float32)
    return jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(jnp.float32))


def float32_or_zeros(x: Array | None, shape: tuple[int, ...]) -> Array:
    """Return an optional array in float32; zeros of the shape if it is None."""
    return jnp.zeros(shape, jnp.float32) if x is None else x.astype(jnp.float32)


def per_token(inputs: ScanInputs) -> dict[str, Array | None]:
    """Return the selective scan's float arrays with a time dimension, by name."""
    return dict(u=inputs.x, dt=inputs.dt, B=inputs.B, C=inputs.C, z=inputs.z)
