"""Attention on TPU by JAX's splash attention, a flash attention (arXiv 2205.14135) with masks.

Lengths are padded at the end to a multiple of a block; causal masks keep the padding unseen.
"""

import jax
import jax.numpy as jnp
from jax import Array

_LANES = 128  # blocks are multiples of it
_LARGEST_BLOCK = 640  # backward, scores of larger blocks do not fit the fast memory of a v5e


def unsupported(
    q: Array, k: Array, v: Array, segment_ids: Array | None, prefix: int = 0
) -> str | None:
    """Why these arguments cannot be served; None where they can."""
    if prefix:
        return "it has no prefix that the tokens of all documents see"
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"it takes bfloat16, these are {q.dtype}, {k.dtype} and {v.dtype}"
    return None


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Attend; arguments and result as in `kernels.attention.attention`, `interpret` for tests."""
    # Here, as it takes most of a second to import.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = q.shape[1]
    block = block_size(length)
    tail = -length % block
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # splash does not scale
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, tail), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v)
    )  # [B, H, T, K]
    shape = (length + tail, length + tail)
    if window is None:
        mask = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, tail))).astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(q=ids, kv=ids))
    return out.swapaxes(1, 2)[:, :length]


def block_size(length: int) -> int:
    """Queries, and keys, of a block: large blocks are quicker, but padding costs."""

    def cost(block: int) -> tuple[float, int]:
        padded = length + -length % block
        return padded * (1 + _LANES / block), padded

    return min(range(_LANES, _LARGEST_BLOCK + 1, _LANES), key=cost)
