"""A matrix product with a float32 master kernel, computed in the model's dtype."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


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
        rngs=rngs,
    )


# Statistics and scale in float32 whatever the activations are; `dtype` is that of the result.
rms_norm = functools.partial(nnx.RMSNorm, param_dtype=jnp.float32)
