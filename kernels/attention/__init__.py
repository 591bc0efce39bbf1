"""Causal grouped-query attention."""

from jax import Array

from kernels.attention import xla
from kernels.checks import check_shapes


def attention(q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
    """Causal attention with H query heads that share H_kv key-value heads (GQA, arXiv 2305.13245).

    Query head h uses key-value head h // (H / H_kv); scores are scaled by K**-0.5; the softmax is
    float32. The weight of a masked token is exactly zero. Where it is differentiated, the weights
    of all heads, [B, H, T, about T / 2], are kept for the backward pass.

    Args:
      q: queries [B, T, H, K], any float dtype.
      k: keys [B, T, H_kv, K]; H is a multiple of H_kv.
      v: values [B, T, H_kv, K].
      segment_ids: documents, [B, T], integer: a token attends within its document alone. None: one
        document.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      ValueError: if shapes do not fit each other.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "attention: q must be [B, T, H, K] and k [B, T, H_kv, K], "
            f"found shapes {q.shape}, {k.shape}"
        )
    sizes = dict(zip("BTHK", q.shape, strict=True)) | {"H_kv": k.shape[2]}
    arrays = {
        "k": (k, "B T H_kv K"),
        "v": (v, "B T H_kv K"),
        "segment_ids": (segment_ids, "B T"),
    }
    check_shapes("attention", sizes, arrays)
    if sizes["H"] % sizes["H_kv"]:
        raise ValueError(
            f"attention: the {sizes['H']} query heads must be a multiple of the "
            f"{sizes['H_kv']} key-value heads"
        )
    return xla.attention(q, k, v, segment_ids)
