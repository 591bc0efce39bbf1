"""The gated MLP (SwiGLU, arXiv 2002.05202)."""

from typing import NamedTuple

import jax
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import linear


class MLPOptions(NamedTuple):
    """What some models add to an MLP.

    Attributes:
      gate_multiplier: factor on the gate before its silu.
      down_multiplier: factor on the result.
      bias: whether each of the three products has one.
    """

    gate_multiplier: float = 1.0
    down_multiplier: float = 1.0
    bias: bool = False


PLAIN_MLP = MLPOptions()


class SwiGLU(nnx.Module):
    """An MLP down(silu(gate(x)) * up(x)) with F hidden units."""

    def __init__(
        self, width: int, hidden: int, context: LayerContext, options: MLPOptions = PLAIN_MLP
    ):
        self.gate_multiplier, self.down_multiplier = options[:2]
        self.gate_proj = linear(width, hidden, context, bias=options.bias)
        self.up_proj = linear(width, hidden, context, bias=options.bias)
        self.down_proj = linear(hidden, width, context, bias=options.bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the transformed tokens [..., D] of x [..., D]."""
        gate = jax.nn.silu(self.gate_proj(x) * self.gate_multiplier)
        return self.down_proj(gate * self.up_proj(x)) * self.down_multiplier
