"""Depthwise causal convolution over time."""

import jax.numpy as jnp
from jax import Array, lax

from kernels.causal_conv import xla
from kernels.checks import check_arguments
from kernels.partition import num_parts, over_mesh
from kernels.sequence import Axes, halo_before

_LAYOUTS = "B L E", "taps E", "E", "B L", "B before E"
_OUT_LAYOUTS = _LAYOUTS[0], _LAYOUTS[4]


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    segment_ids: Array | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
) -> Array | tuple[Array, Array]:
    """Return each channel's convolution with its W taps, over the W-1 earlier inputs and its own.

        y_t = bias + sum over k of weight[k] * x_{t - (W-1) + k}

    Args:
      x: inputs [B, L, E], any float dtype, any length L >= 1.
      weight: [W, E]; weight[W-1] multiplies the present input (`weight[:, 0, k]` of a PyTorch
        conv1d is weight[k]).
      bias: [E]; None: zero.
      segment_ids: documents, [B, L], integer, each document contiguous: inputs of other documents
        count as zero. None: one document.
      initial_state: the W-1 inputs before position 0, [B, W-1, E], of the document of position 0.
        None: zero.
      return_final_state: whether to also return the state after position L-1: the last W-1
        inputs, with zeros for those of other documents than the last one.

    Returns:
      y [B, L, E] in x's dtype, accumulated in float32, or (y, final state [B, W-1, E] in x's dtype)
      with `return_final_state`.

    Raises:
      ValueError: a dtype is not as above, an array is empty or shapes do not match each other.
    """
    sizes = check_arguments(
        "causal_conv",
        {"x": x, "weight": weight, "bias": bias, "segment_ids": segment_ids},
        ("B L E", "W E", "E", "B L"),
        optional=("bias", "segment_ids"),
        integers=("segment_ids",),
    )
    check_arguments(
        "causal_conv",
        {"initial_state": initial_state},
        ("B W-1 E",),
        optional=("initial_state",),
        sizes=sizes | {"W-1": sizes["W"] - 1},
        may_be_empty=("W-1",),
    )
    run = xla.causal_conv
    # If a device has fewer than W-1 positions, XLA finds which others it needs.
    if 1 < num_parts("L") <= sizes["L"] // max(1, sizes["W"] - 1):
        run = over_mesh(_over_sequence, _LAYOUTS, _OUT_LAYOUTS, axes_of=("L",))
    y, state = run(x, weight, bias, segment_ids, initial_state)
    return (y, state) if return_final_state else y


def _over_sequence(
    x: Array,
    weight: Array,
    bias: Array | None,
    segment_ids: Array | None,
    initial_state: Array | None,
    axes: Axes,
) -> tuple[Array, Array]:
    """Return this device's part of y and, on every device, the final state."""
    if not axes:
        return xla.causal_conv(x, weight, bias, segment_ids, initial_state)
    count, device = weight.shape[0] - 1, lax.axis_index(axes)
    inputs = halo_before(x, count, axes)
    if segment_ids is not None:
        same = halo_before(segment_ids, count, axes) == segment_ids[:, :1]
        inputs = jnp.where(same[..., None], inputs, 0)
    if initial_state is not None:
        inputs = jnp.where(device == 0, initial_state.astype(x.dtype), inputs)
    y, state = xla.causal_conv(x, weight, bias, segment_ids, inputs)
    is_last = device == lax.axis_size(axes) - 1
    return y, lax.psum(jnp.where(is_last, state, 0), axes)
