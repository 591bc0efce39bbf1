"""One token of attention over kept keys and values, for decoding."""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.checks import check_arguments
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
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other.
    """
    by_slot = "B H_kv C K"
    sizes = check_arguments(
        "attention_step",
        {"q": (q, "B H K"), "k": (k, by_slot), "v": (v, by_slot), "visible": (visible, "B C")},
        booleans=("visible",),
    )
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
