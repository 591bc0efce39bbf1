"""The gated MLP (SwiGLU, arXiv 2002.05202)."""

import jax
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import linear


class SwiGLU(nnx.Module):
    """An MLP down(silu(gate(x)) * up(x)) with F hidden units.

    With `bias` each of the three products has one. `gate_multiplier` scales the gate before its
    silu, `down_multiplier` the result.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        context: LayerContext,
        *,
        gate_multiplier: float = 1.0,
        down_multiplier: float = 1.0,
        bias: bool = False,
    ):
        self.gate_multiplier, self.down_multiplier = gate_multiplier, down_multiplier
        self.gate_proj = linear(width, hidden, context, bias=bias)
        self.up_proj = linear(width, hidden, context, bias=bias)
        self.down_proj = linear(hidden, width, context, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the transformed tokens [..., D] of x [..., D]."""
        gate = jax.nn.silu(self.gate_proj(x) * self.gate_multiplier)
        return self.down_proj(gate * self.up_proj(x)) * self.down_multiplier
