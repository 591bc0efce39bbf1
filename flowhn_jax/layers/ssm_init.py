"""Initial values that the state-space layers share."""

import math

import jax
import jax.numpy as jnp

_DT_MIN, _DT_MAX = 1e-3, 1e-1  # of the initial step sizes (arXiv 2312.00752, section 3.6)


def dt_bias_init(key: jax.Array, features: int) -> jax.Array:
    """Return a bias [features] whose softplus is log-uniform in 0.001..0.1."""
    low, high = math.log(_DT_MIN), math.log(_DT_MAX)
    dt = jnp.exp(jax.random.uniform(key, (features,), minval=low, maxval=high))
    return dt + jnp.log(-jnp.expm1(-dt))


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Return random float32 values, uniform in -bound..bound."""
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
