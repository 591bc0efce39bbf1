"""Depthwise causal convolution in plain XLA: shifted multiply-adds, which fuse into one loop.

`jax.lax.conv_general_dilated` with one group per channel takes about fifty times as long on a CPU.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.manual_axes import vary_alike


def causal_conv(
    x: Array,
    weight: Array,
    bias: Array | None,
    segment_ids: Array | None,
    initial_state: Array | None,
) -> tuple[Array, Array]:
    """Return (y, final state), as `kernels.causal_conv.causal_conv` does."""
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
    if bias is None:
        bias = jnp.zeros_like(weight[0])
    inputs, weight, bias = vary_alike((inputs, weight, bias))
    return _convolve(inputs, weight, bias, ids), state


@jax.custom_vjp
def _convolve(inputs: Array, weight: Array, bias: Array, ids: Array | None) -> Array:
    """Return y [B, L, E] from inputs [B, W-1 + L, E] and their documents [B, W-1 + L]."""
    y = bias.astype(jnp.float32)
    for k, tap in enumerate(_taps(inputs, ids, weight.shape[0])):
        y = y + tap * weight[k].astype(jnp.float32)
    return y.astype(inputs.dtype)


def _convolve_forward(inputs: Array, weight: Array, bias: Array, ids: Array | None):
    return _convolve(inputs, weight, bias, ids), (inputs, weight, bias, ids)


def _convolve_backward(residuals, dy: Array):
    # Written by hand: autodiff would keep the shifted copies, and if it recomputes them XLA's CPU
    # backend takes up to twenty times as long as for these sums.
    inputs, weight, bias, ids = residuals
    count = weight.shape[0]
    dy = dy.astype(jnp.float32)
    dinputs, dweight = jnp.zeros_like(inputs, jnp.float32), []
    for k, tap in enumerate(_taps(inputs, ids, count)):
        dweight.append((dy * tap).sum((0, 1)))
        dtap = _masked(dy * weight[k].astype(jnp.float32), ids, k, count)
        dinputs = dinputs + jnp.pad(dtap, ((0, 0), (k, count - 1 - k), (0, 0)))
    gradients = dinputs, jnp.stack(dweight), dy.sum((0, 1))
    like = inputs, weight, bias
    return *(g.astype(x.dtype) for g, x in zip(gradients, like, strict=True)), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _taps(inputs: Array, ids: Array | None, count: int) -> list[Array]:
    """Return the inputs of each of `count` taps, [B, L, E] float32."""
    length = inputs.shape[1] - (count - 1)
    wide = inputs.astype(jnp.float32)
    return [_masked(wide[:, k : k + length], ids, k, count) for k in range(count)]


def _masked(tap: Array, ids: Array | None, k: int, count: int) -> Array:
    """Return tap k of `count`, [B, L, E], with zeros for inputs of other documents."""
    if ids is None or k == count - 1:
        return tap
    return jnp.where(_same(ids[:, k : k + tap.shape[1]], ids[:, count - 1 :]), tap, 0)


def _same(ids: Array, others: Array) -> Array:
    return (ids == others)[..., None]
