"""A matrix product with a float32 master kernel, computed in the model's dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.backends import target_platform


def linear(
    in_features: int,
    out_features: int | tuple[int, ...],
    *,
    init_std: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    output_dtype: jnp.dtype | None = None,
) -> nnx.LinearGeneral:
    """x [..., in] @ kernel [in, *out] without bias; kernel normal with `init_std`, in float32.

    `output_dtype` keeps the accumulator of the product where more than `dtype` is needed.
    """
    return nnx.LinearGeneral(
        in_features,
        out_features,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=jax.nn.initializers.normal(init_std),
        preferred_element_type=output_dtype or dtype,
        dot_general=_product,
        rngs=rngs,
    )


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """x [..., in] by kernel [in, *out], as of `jax.lax.dot_general`.

    On one CPU device as a product of two matrices: XLA takes more than twice as long for the
    gradient of one that sums over sequences and positions. Over a mesh these stay apart, so that
    each can be cut.
    """
    if target_platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows, columns = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    y = jax.lax.dot_general(rows, columns, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


# Statistics and scale in float32 whatever the activations are; `dtype` is that of the result.
rms_norm = functools.partial(nnx.RMSNorm, param_dtype=jnp.float32)
