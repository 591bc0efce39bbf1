"""Depthwise causal convolution over time."""

import jax.numpy as jnp
from jax import Array, lax

from kernels.causal_conv import xla
from kernels.checks import check_arguments
from kernels.partition import over_mesh, ways
from kernels.sequence import Axes, before

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
    """Convolve each channel with its own W taps, over the present and the W-1 inputs before it.

        y_t = bias + sum over k of weight[k] * x_{t - (W-1) + k}

    Args:
      x: inputs [B, L, E], any float dtype, any length L >= 1.
      weight: [W, E]; weight[W-1] multiplies the present input (`weight[:, 0, k]` of a PyTorch
        conv1d is weight[k]).
      bias: [E]; None: zero.
      segment_ids: documents, [B, L], integer, each document contiguous: inputs of another document
        count as zero. None: one document.
      initial_state: the W-1 inputs before position 0, [B, W-1, E]; they belong to the document of
        position 0. None: zero.
      return_final_state: whether to return the state after position L-1 as well: the last W-1
        inputs, with zeros for those of another document than the last one's.

    Returns:
      y [B, L, E] in x's dtype, accumulated in float32, or, where asked, (y, final state
      [B, W-1, E] in x's dtype).

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other.
    """
    sizes = check_arguments(
        "causal_conv",
        {"x": (x, "B L E"), "weight": (weight, "W E")},
        {"bias": (bias, "E"), "segment_ids": (segment_ids, "B L")},
        integers=("segment_ids",),
    )
    check_arguments(
        "causal_conv",
        {},
        {"initial_state": (initial_state, "B W-1 E")},
        sizes=sizes | {"W-1": sizes["W"] - 1},
        may_be_empty=("W-1",),
    )
    run = xla.causal_conv
    if 1 < ways("L") <= sizes["L"] // max(1, sizes["W"] - 1):  # else XLA finds what a device needs
        run = over_mesh(_over_sequence, _LAYOUTS, _OUT_LAYOUTS, meets="L")
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
    """This device's outputs, from the last inputs of the device before it, and the final state."""
    if not axes:
        return xla.causal_conv(x, weight, bias, segment_ids, initial_state)
    count, device = weight.shape[0] - 1, lax.axis_index(axes)
    inputs = before(x, count, axes)
    if segment_ids is not None:
        same = before(segment_ids, count, axes) == segment_ids[:, :1]
        inputs = jnp.where(same[..., None], inputs, 0)
    if initial_state is not None:
        inputs = jnp.where(device == 0, initial_state.astype(x.dtype), inputs)
    y, state = xla.causal_conv(x, weight, bias, segment_ids, inputs)
    is_last = device == lax.axis_size(axes) - 1
    return y, lax.psum(jnp.where(is_last, state, 0), axes)
