"""Decay rates of state-space operations."""

import jax.numpy as jnp
from jax import Array

# Far enough from the largest float32 that its products with gradients are finite. Any time step
# above 1e-28 decays a state to zero.
_LEAST_RATE = -1e30


def finite_rates(A: Array) -> Array:
    """Return A in float32, with the least finite rate in place of lower ones and of -inf.

    So -inf has the results and gradients of the limit: the state is forgotten at every token, the
    gradient of A is 0, and a time step of 0 keeps the state. In the formulas themselves, 0 * -inf
    is NaN.
    """
    return jnp.maximum(jnp.asarray(A, jnp.float32), _LEAST_RATE)
