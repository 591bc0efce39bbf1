"""Attention on TPUs by JAX's splash attention, a flash attention (arXiv 2205.14135) with masks.

Lengths are padded at the end to a multiple of a block; causal masks hide the padding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.attention.inputs import AttentionInputs, Visibility, pad_length
from kernels.checks import refused_dtype
from kernels.custom_vjp import KERNEL_RESULT

_LANES = 128  # blocks are multiples of it
_LARGEST_BLOCK = 640  # the backward pass's scores of larger blocks do not fit in a v5e's VMEM
# The fused backward pass writes dq once per block of keys. Compiled for a v5e, 4 blocks take no
# more memory than with separate passes, 8 blocks 1.6 times as much.
_MAX_FUSED_BLOCKS = 4


def unsupported(inputs: AttentionInputs, visibility: Visibility) -> str | None:
    """Return why the kernel cannot run these inputs; None if it can."""
    if visibility.prefix:
        return "it does not support a prefix"
    if visibility.queries is not None:
        return "it does not support a selection of queries"
    if reason := refused_dtype(inputs.vectors(), ("bfloat16",)):
        return reason
    return None


def attention(
    inputs: AttentionInputs, visibility: Visibility, scale: float, *, interpret: bool = False
) -> Array:
    """Return the output of `kernels.attention.attention`.

    Args:
      inputs: the inputs of the operation.
      visibility: without a prefix and without `queries`.
      scale: factor on the scores. If it is not 1, the queries are multiplied by it.
      interpret: whether to interpret the kernel, for tests on other platforms.
    """
    # Imported here because it takes most of a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    window, length = visibility.window, inputs.q.shape[1]
    block = block_size(length)
    tail = -length % block
    padded = pad_length(inputs, tail)
    q, k, v = (x.swapaxes(1, 2) for x in padded.vectors().values())  # [B, H, T, K]
    if scale != 1:
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    shape = (length + tail, length + tail)
    if window is None:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    is_fused = (length + tail) // block <= _MAX_FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if is_fused else block,
        block_kv_dq=None if is_fused else block,
        use_fused_bwd_kernel=is_fused,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KERNEL_RESULT,
        interpret=interpret,
    )
    out: Any  # an array; with other options the kernel returns residuals as well
    if padded.segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = padded.segment_ids.astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=ids, kv=ids))
    return out.swapaxes(1, 2)[:, :length]


def block_size(length: int) -> int:
    """Return the number of queries and keys per block: larger is faster, but padding costs."""

    def cost(block: int) -> tuple[float, int]:
        padded = length + -length % block
        return padded * (1 + _LANES / block), padded

    return min(range(_LANES, _LARGEST_BLOCK + 1, _LANES), key=cost)
