"""Precision of matrix products."""

import jax.numpy as jnp
from jax import lax


def product_precision(dtype: jnp.dtype) -> lax.Precision:
    """Of products whose operands are of this dtype: as exact as the dtype itself.

    By default GPUs and TPUs round float32 operands, to TF32 and bfloat16.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
