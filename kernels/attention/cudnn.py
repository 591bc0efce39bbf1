"""Attention on NVIDIA GPUs by cuDNN's flash attention, as `jax.nn` calls it.

cuDNN is told of documents, and of a prefix that all see, by a mask, [B, 1, T, T] in bfloat16: its
packed layout, which would do without, needs the greatest number of documents in a window
beforehand, and a Hopper GPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kernels.backends import target_capability, target_device_kind


def unsupported(
    q: Array, k: Array, v: Array, segment_ids: Array | None, prefix: int = 0
) -> str | None:
    """Why these arguments cannot be served; None where they can."""
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
        return f"it takes bfloat16 or float16, these are {q.dtype}, {k.dtype} and {v.dtype}"
    capability = target_capability()
    if capability is None or capability < 80:
        return f"it takes an NVIDIA GPU from Ampere on, this is {target_device_kind()}"
    size, largest = q.shape[-1], 256 if capability >= 90 else 128
    if size % 8 or size > largest:
        return f"it takes head sizes that are multiples of 8 up to {largest}, this is {size}"
    try:  # whether cuDNN is installed, and new enough for these shapes
        jax.eval_shape(partial(attention, prefix=prefix), q, k, v, segment_ids)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    window: int | None = None,
    prefix: int = 0,
) -> Array:
    """Attend; arguments and result as in `kernels.attention.attention`."""
    length = q.shape[1]
    tail = length % 2  # the gradient of odd lengths is not supported
    q, k, v = (jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))) for x in (q, k, v))
    mask = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (0, tail)))
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
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]
