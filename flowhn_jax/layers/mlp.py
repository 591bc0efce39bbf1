"""The gated MLP (SwiGLU, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear


class SwiGLU(nnx.Module):
    """Hidden size F, no bias."""

    def __init__(self, width: int, hidden: int, *, init_std: float, dtype: jnp.dtype, rngs):
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(width, hidden, **kwargs)
        self.up_proj = linear(width, hidden, **kwargs)
        self.down_proj = linear(hidden, width, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> down(silu(gate(x)) * up(x)) [..., D]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
