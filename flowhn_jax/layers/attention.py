"""Grouped-query causal attention without positional encoding, as in Jamba (arXiv 2403.19887)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear
from kernels.attention import attention


class Attention(nnx.Module):
    """Causal attention over the tokens it is given: H query heads, G key-value heads, size K."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        init_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.head_dim = head_dim
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.q_proj = linear(width, heads * head_dim, **kwargs)
        self.k_proj = linear(width, kv_heads * head_dim, **kwargs)
        self.v_proj = linear(width, kv_heads * head_dim, **kwargs)
        self.o_proj = linear(heads * head_dim, width, **kwargs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """x [B, T, D], segment_ids [B, T] -> [B, T, D]; only tokens of one segment see another."""
        batch, length, _ = x.shape

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(batch, length, -1, self.head_dim)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        out = attention(q, k, v, segment_ids=segment_ids)
        return self.o_proj(out.reshape(batch, length, -1))
