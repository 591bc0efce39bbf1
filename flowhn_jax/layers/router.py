"""The router of a learned split: a score per token, which decides its branch and scales its update.

As in Switch Transformers (arXiv 2101.03961) and Mixture-of-Depths (arXiv 2404.02258), the score
learns through a gate on what the chosen branch adds to the stream: the decision itself has no
gradient. The gate is 2 sigmoid(score) in attention and 2 sigmoid(-score) in the SSM, 1 at a score
of 0, where a token changes its branch.
"""

import math
import statistics

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import rms_norm


class Router(nnx.Module):
    """A score per token, linear in the normed stream; float32 whatever `context.dtype` is.

    Tokens with a score above 0 go to attention: initially a share of about `share` of them.
    """

    def __init__(self, width: int, share: float, context: LayerContext):
        self.norm = rms_norm(width, context, dtype=jnp.float32, unscaled_epsilon=context.norm_eps)
        std = context.init_std
        self.weight = nnx.Param(std * jax.random.normal(context.rngs.params(), (width,)))
        # Scores of random normed tokens are normal, with a deviation of std * sqrt(width).
        above = statistics.NormalDist(0, std * math.sqrt(width)).inv_cdf(share)
        self.bias = nnx.Param(jnp.full(1, above, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the scores [...] in float32 of tokens x [..., D]."""
        highest = jax.lax.Precision.HIGHEST
        product = jnp.einsum("...d,d->...", self.norm(x), self.weight[...], precision=highest)
        return product + self.bias[...]


def gate_update(x: jax.Array, y: jax.Array, scores: jax.Array, attends: jax.Array) -> jax.Array:
    """Return the outputs y [..., D] of the tokens' branches, with what they add to x gated.

    Args:
      x: [..., D], the stream before the branches.
      y: [..., D], the branches' outputs, which contain x.
      scores: [...] float32.
      attends: [...] bool, whether a token's branch is attention.
    """
    gates = 2 * jax.nn.sigmoid(jnp.where(attends, scores, -scores))[..., None]
    before = x.astype(jnp.float32)
    return (before + gates * (y.astype(jnp.float32) - before)).astype(x.dtype)
