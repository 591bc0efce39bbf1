"""One token of attention over cached keys and values, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments, check_groups
from kernels.precision import einsum_to_float32

_LAYOUTS = ("B H K", "B H_kv C K", "B H_kv C K", "B C")


def attention_step(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Return the output of `kernels.attention.attention` for one query per sequence.

    Args:
      q: queries [B, H, K], any float dtype.
      k: cached keys [B, H_kv, C, K]; H is a multiple of H_kv.
      v: cached values [B, H_kv, C, K].
      visible: [B, C] bool, the slots that the query sees; at least one per sequence.

    Returns:
      [B, H, K] in q's dtype.

    Raises:
      ValueError: a dtype is not as above, an array is empty or shapes do not match each other.
    """
    arrays = {"q": q, "k": k, "v": v, "visible": visible}
    sizes = check_arguments("attention_step", arrays, _LAYOUTS, booleans=("visible",))
    check_groups("attention_step", sizes["H"], sizes["H_kv"], "key-value heads")
    batch, heads, size = q.shape
    q = q.reshape(batch, sizes["H_kv"], -1, size)
    scores = einsum_to_float32("bgrk,bgck->bgrc", q, k) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = einsum_to_float32("bgrc,bgck->bgrk", weights.astype(v.dtype), v)
    return out.reshape(batch, heads, size).astype(q.dtype)
