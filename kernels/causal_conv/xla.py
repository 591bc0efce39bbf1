"""Depthwise causal convolution in plain XLA: shifted multiply-adds, which fuse into one loop.

(`jax.lax.conv_general_dilated` with one group a channel takes some fifty times as long on a CPU.)
"""

import jax
import jax.numpy as jnp
from jax import Array


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None,
    segment_ids: Array | None,
    initial_state: Array | None,
) -> tuple[Array, Array]:
    """Return (y, final state); arguments and results as in `kernels.causal_conv.causal_conv`."""
    length, before = x.shape[1], weight.shape[0] - 1
    if initial_state is None:
        inputs = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
    else:
        inputs = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    state = inputs[:, length:]
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (before, 0)), mode="edge")
        state = jnp.where(_same(ids[:, length:], ids[:, -1:]), state, 0)
    return _convolve(inputs, weight, bias, ids), state


@jax.checkpoint  # else its gradient would save every shifted copy of the inputs
def _convolve(inputs: Array, weight: Array, bias: Array | None, ids: Array | None) -> Array:
    """inputs [B, W-1 + L, E] and their documents [B, W-1 + L] -> y [B, L, E]."""
    taps = weight.shape[0]
    length = inputs.shape[1] - (taps - 1)
    wide, weight = inputs.astype(jnp.float32), weight.astype(jnp.float32)
    y = 0.0 if bias is None else bias.astype(jnp.float32)
    for k in range(taps):
        tap = wide[:, k : k + length]
        if ids is not None and k < taps - 1:
            tap = jnp.where(_same(ids[:, k : k + length], ids[:, taps - 1 :]), tap, 0)
        y = y + tap * weight[k]
    return y.astype(inputs.dtype)


def _same(ids: Array, others: Array) -> Array:
    return (ids == others)[..., None]
