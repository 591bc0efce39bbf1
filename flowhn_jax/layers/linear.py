"""Linear layers and RMS norms with float32 parameters, computed in the model's dtype."""

import math
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
    bias: bool = False,
) -> nnx.LinearGeneral:
    """Return a layer x [..., in] @ kernel [in, *out], plus a bias [*out] if `bias` is set.

    Both parameters are float32.

    Args:
      in_features: size of the last dimension of x.
      out_features: one size, or several dimensions that replace the last one of x.
      context: the context of the model.
      output_dtype: the result's dtype, where it needs more precision than `context.dtype`: then the
        product's accumulator is kept.
      bias: whether to add one, which is 0 initially.
    """
    return nnx.LinearGeneral(
        in_features,
        out_features,
        use_bias=bias,
        dtype=context.dtype,
        param_dtype=jnp.float32,
        kernel_init=jax.nn.initializers.normal(context.init_std),
        preferred_element_type=context.dtype if output_dtype is None else output_dtype,
        dot_general=_product,
        rngs=context.rngs,
    )


def linear_to_heads(
    layer: nnx.LinearGeneral, x: jax.Array, head_dim: int, *, scale: float = 1.0
) -> jax.Array:
    """Return scale * layer(x) as heads, [B, T, H, K] or [B, H, K].

    The parameters are scaled, not the result. For sequences the kernel is reshaped as well: TPUs
    pad the last dimension of an array to 128, so that a reshape from H * K to H, K is a copy.

    Args:
      layer: with a kernel [D, H * K], and maybe a bias [H * K].
      x: sequences [B, T, D], or tokens [B, D].
      head_dim: K.
      scale: factor.
    """
    kernel = (scale * layer.kernel[...]).astype(layer.dtype)
    if x.ndim == 3:
        kernel = kernel.reshape(x.shape[-1], -1, head_dim)
    y = _apply(layer, x, kernel, 1).reshape(*x.shape[:-1], -1, head_dim)
    if layer.bias is None:
        return y
    return y + (scale * layer.bias[...]).astype(y.dtype).reshape(-1, head_dim)


def linear_part(layer: nnx.LinearGeneral, x: jax.Array, part: int | slice) -> jax.Array:
    """Return a part of the first output dimension of layer(x), for x [..., D].

    Args:
      layer: with a kernel [D, ...], and maybe a bias.
      x: [..., D].
      part: an index, which removes the dimension, or a slice.
    """
    y = _apply(layer, x, layer.kernel[...][:, part].astype(layer.dtype), 1)
    return y if layer.bias is None else y + layer.bias[...][part].astype(y.dtype)


def linear_parts(layer: nnx.LinearGeneral, x: jax.Array) -> tuple[jax.Array, ...]:
    """Return layer(x) [..., N, F] as its N parts [..., F], for x [..., D] and a kernel [D, N, F].

    On a CPU it is one product. Elsewhere each part is a product of its own: the gradient of the one
    product would first copy the parts' gradients into one array.
    """
    if target_platform() == "cpu":
        return tuple(jnp.unstack(layer(x), axis=-2))
    return tuple(linear_part(layer, x, part) for part in range(layer.kernel.shape[1]))


def linear_from_heads(layer: nnx.LinearGeneral, x: jax.Array) -> jax.Array:
    """Return layer(x) [B, T, D] or [B, D] of heads x [B, T, H, K] or [B, H, K].

    As in `linear_to_heads`, the kernel is reshaped for sequences, and x for tokens.
    """
    kernel = layer.kernel[...].astype(layer.dtype)
    if x.ndim == 4:
        y = _apply(layer, x, kernel.reshape(*x.shape[-2:], -1), 2)
    else:
        y = _apply(layer, x.reshape(len(x), -1), kernel, 1)
    return y if layer.bias is None else y + layer.bias[...].astype(y.dtype)


def _apply(layer: nnx.LinearGeneral, x: jax.Array, kernel: jax.Array, contracted: int) -> jax.Array:
    """Return x [..., *in] by kernel [*in, *out], with `contracted` dimensions in."""
    axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    options = {"preferred_element_type": layer.preferred_element_type}
    return _product(x.astype(layer.dtype), kernel, (axes, ((), ())), **options)


def _product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Return x [..., *in] by kernel [*in, *out], as `jax.lax.dot_general` does.

    On one CPU device it is a product of two matrices: XLA takes more than twice as long for the
    gradient of a product that sums over sequences and positions. Over a mesh these dimensions stay
    apart, so that each can be sharded.
    """
    if target_platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    contracted = len(dimension_numbers[0][1])
    size = math.prod(kernel.shape[:contracted])
    rows, columns = x.reshape(-1, size), kernel.reshape(size, -1)
    y = jax.lax.dot_general(rows, columns, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[: x.ndim - contracted], *kernel.shape[contracted:])


def rms_norm(
    features: int,
    context: LayerContext,
    *,
    dtype: Any = None,
    unscaled_epsilon: float | None = None,
) -> nnx.RMSNorm:
    """Return an RMS norm whose statistics and scale are float32 whatever the activations are.

    Args:
      features: size of the last dimension, over which the mean square is taken.
      context: the context of the model.
      dtype: the dtype of the result; None: `context.dtype`.
      unscaled_epsilon: added to the mean square in a norm without a scale; None: a norm with a
        scale, and with `context.norm_eps`.
    """
    has_scale = unscaled_epsilon is None
    return nnx.RMSNorm(
        features,
        epsilon=context.norm_eps if has_scale else unscaled_epsilon,
        use_scale=has_scale,
        dtype=context.dtype if dtype is None else dtype,
        param_dtype=jnp.float32,
        rngs=context.rngs,
    )
