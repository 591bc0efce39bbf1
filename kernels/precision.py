"""Precision of matrix products."""

import jax.numpy as jnp
from jax import Array, lax


def product_precision(dtype: jnp.dtype) -> lax.Precision:
    """Return the precision at which products of operands of a dtype are as exact as the dtype.

    By default GPUs and TPUs round float32 operands to TF32 and bfloat16.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def einsum_to_float32(equation: str, a: Array, b: Array) -> Array:
    """Return the product of two arrays, accumulated in float32, as exact as their dtype."""
    precision = product_precision(jnp.result_type(a, b))
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
