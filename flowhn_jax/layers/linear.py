"""Linear layers and RMS norms with float32 parameters, computed in the model's dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from kernels.backends import target_platform


def linear(
    in_features: int,
    out_features: int | tuple[int, ...],
    context: LayerContext,
    *,
    output_dtype: Any = None,
) -> nnx.LinearGeneral:
    """Return a layer x [..., in] @ kernel [in, *out] without bias; the kernel is float32.

    Args:
      in_features: size of the last dimension of x.
      out_features: one size, or several dimensions that replace the last one of x.
      context: of the model.
      output_dtype: of the result, where it needs more precision than `context.dtype`: the product's
        accumulator is then kept.
    """
    return nnx.LinearGeneral(
        in_features,
        out_features,
        use_bias=False,
        dtype=context.dtype,
        param_dtype=jnp.float32,
        kernel_init=jax.nn.initializers.normal(context.init_std),
        preferred_element_type=context.dtype if output_dtype is None else output_dtype,
        dot_general=_product,
        rngs=context.rngs,
    )


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Return x [..., in] by kernel [in, *out], as `jax.lax.dot_general` does.

    On one CPU device it is a product of two matrices: XLA takes more than twice as long for the
    gradient of a product that sums over sequences and positions. Over a mesh these dimensions stay
    apart, so that each can be sharded.
    """
    if target_platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    rows, columns = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    y = jax.lax.dot_general(rows, columns, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def rms_norm(features: int, context: LayerContext, *, dtype: Any = None) -> nnx.RMSNorm:
    """Return an RMS norm whose statistics and scale are float32 whatever the activations are.

    Args:
      features: size of the last dimension, over which the mean square is taken.
      context: of the model.
      dtype: of the result; None: `context.dtype`.
    """
    return nnx.RMSNorm(
        features,
        epsilon=context.norm_eps,
        dtype=context.dtype if dtype is None else dtype,
        param_dtype=jnp.float32,
        rngs=context.rngs,
    )
