"""The gated MLP (SwiGLU, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.linear import linear


class SwiGLU(nnx.Module):
    """Hidden size F, no bias; factors on the gate before its silu and on the result."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        init_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        gate_multiplier: float = 1.0,
        down_multiplier: float = 1.0,
    ):
        self.gate_multiplier, self.down_multiplier = gate_multiplier, down_multiplier
        kwargs = dict(init_std=init_std, dtype=dtype, rngs=rngs)
        self.gate_proj = linear(width, hidden, **kwargs)
        self.up_proj = linear(width, hidden, **kwargs)
        self.down_proj = linear(hidden, width, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> down(silu(gate(x)) * up(x)) [..., D]."""
        gate = jax.nn.silu(self.gate_proj(x) * self.gate_multiplier)
        return self.down_proj(gate * self.up_proj(x)) * self.down_multiplier
