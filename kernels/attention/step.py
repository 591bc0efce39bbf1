"""One token of attention over kept keys and values, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_shapes
from kernels.precision import product_precision


def attention_step(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attend with one query a sequence, as `kernels.attention.attention` does.

    Args:
      q: queries [B, H, K], any float dtype.
      k: kept keys [B, H_kv, C, K]; H is a multiple of H_kv.
      v: kept values [B, H_kv, C, K].
      visible: [B, C] bool, the places that hold what the query sees; at least one a sequence.

    Returns:
      [B, H, K] in q's dtype.

    Raises:
      ValueError: if shapes do not fit each other.
    """
    if q.ndim != 3 or k.ndim != 4:
        raise ValueError(
            "attention_step: q must be [B, H, K] and k [B, H_kv, C, K], "
            f"found shapes {q.shape}, {k.shape}"
        )
    sizes = dict(zip("BHK", q.shape, strict=True)) | {"C": k.shape[2], "H_kv": k.shape[1]}
    arrays = {"k": (k, "B H_kv C K"), "v": (v, "B H_kv C K"), "visible": (visible, "B C")}
    check_shapes("attention_step", sizes, arrays)
    if sizes["H"] % sizes["H_kv"]:
        raise ValueError(
            f"attention_step: the {sizes['H']} query heads must be a multiple of the "
            f"{sizes['H_kv']} key-value heads"
        )
    batch, heads, size = q.shape
    kwargs = dict(
        precision=product_precision(jnp.result_type(q, k)), preferred_element_type=jnp.float32
    )
    q = q.reshape(batch, sizes["H_kv"], -1, size)
    scores = jnp.einsum("bgrk,bgck->bgrc", q, k, **kwargs) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bgrc,bgck->bgrk", weights.astype(v.dtype), v, **kwargs)
    return out.reshape(batch, heads, size).astype(q.dtype)
