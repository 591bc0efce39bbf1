"""Attention on NVIDIA GPUs by cuDNN's flash attention, as called by `jax.nn`.

Documents, and a prefix that all of them see, are a mask, [B, 1, T, T] in bfloat16. cuDNN's packed
layout would need no mask, but the maximal number of documents in a window in advance, and a Hopper
GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels.attention.inputs import AttentionInputs, Visibility, pad_length
from kernels.backends import target_capability, target_device_kind


def unsupported(inputs: AttentionInputs, visibility: Visibility) -> str | None:
    """Return why cuDNN cannot run these inputs; None if it can."""
    if visibility.queries is not None:
        return "it does not support a selection of queries"
    q, k, v, _ = inputs
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
        return f"it needs bfloat16 or float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    capability = target_capability()
    if capability is None or capability < 80:
        return f"it needs an NVIDIA GPU of Ampere or later, this is {target_device_kind()}"
    size, largest = q.shape[-1], 256 if capability >= 90 else 128
    if size % 8 or size > largest:
        return f"the head size must be a multiple of 8 up to {largest}, this is {size}"
    try:  # whether cuDNN is installed, and recent enough for these shapes
        jax.eval_shape(partial(attention, visibility=visibility, scale=1.0), inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def attention(inputs: AttentionInputs, visibility: Visibility, scale: float) -> Array:
    """Return the output of `kernels.attention.attention`."""
    window, prefix, _ = visibility
    length = inputs.q.shape[1]
    tail = length % 2  # cuDNN has no gradient for odd lengths
    q, k, v, ids = pad_length(inputs, tail)
    mask = None
    if ids is not None:
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    if prefix:
        positions = jnp.arange(length + tail)
        is_prefix = positions < prefix
        if window is not None:
            near = positions[:, None] - positions < window
            mask = near[None, None] if mask is None else mask & near
            window = None
        mask = None if mask is None else mask | is_prefix
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]
