"""Decay rates that the state-space layers share."""

import jax
import jax.numpy as jnp

_MAX_LOG = 88.0  # exp(88) is finite in float32


def decay_rates(a_log: jax.Array) -> jax.Array:
    """Return A = -exp(a_log), finite for every a_log; beyond the largest one the gradient is 0."""
    return -jnp.exp(jnp.minimum(a_log, _MAX_LOG))
