"""The inputs of the two state-space scans, and what every backend does with them first."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

# Far enough from the largest float32 that its products with gradients are finite. Any time step
# above 1e-28 decays a state to zero.
_LEAST_RATE = -1e30


class SelectiveScanInputs(NamedTuple):
    """The arrays of `kernels.selective_scan.selective_scan`, which describes them."""

    u: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None = None
    dt_bias: Array | None = None
    segment_ids: Array | None = None
    initial_state: Array | None = None

    def per_token(self) -> dict[str, Array | None]:
        """Return the float arrays with a time dimension, by name."""
        return {name: getattr(self, name) for name in ("u", "dt", "B", "C", "z")}


class SSDInputs(NamedTuple):
    """The arrays of `kernels.ssd.ssd`, which describes them."""

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    dt_bias: Array | None = None
    segment_ids: Array | None = None
    initial_state: Array | None = None


ScanInputs = TypeVar("ScanInputs", SelectiveScanInputs, SSDInputs)

OPTIONAL = ("D", "z", "dt_bias", "segment_ids", "initial_state")


def finite_rates(A: Array) -> Array:
    """Return A in float32, with lower rates than the least finite one, and -inf, replaced by it.

    So -inf has the results and gradients of the limit: the state is forgotten at every token, the
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
