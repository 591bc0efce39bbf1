"""The token embedding: a float32 table whose rows are cast after the lookup."""

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax.layers.context import LayerContext


class Embedding(nnx.Module):
    """A table [V, D] of float32 rows, looked up in `context.dtype`.

    `nnx.Embed` casts the table first, so that in bfloat16 the gradient of a row is summed over its
    tokens in bfloat16: for a token that occurs 900 times, the sum is off by several percent. Here
    the sum is float32.
    """

    def __init__(self, vocab_size: int, width: int, context: LayerContext):
        self.dtype = context.dtype
        init = jax.nn.initializers.normal(context.init_std)
        self.embedding = nnx.Param(init(context.rngs.params(), (vocab_size, width), jnp.float32))

    def __call__(self, tokens: jax.Array, *, scale: float = 1.0) -> jax.Array:
        """Return the tokens' rows times `scale`, [..., D].

        Args:
          tokens: [...], integer. The row of an id outside 0..V-1 is NaN, negative ids included.
          scale: factor on the rows, applied in float32.
        """
        table = self.embedding[...]
        # `jnp.take` counts negative ids from the end; V lies outside the table.
        ids = jnp.where(tokens < 0, table.shape[0], tokens)
        rows = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
        return (rows.astype(jnp.float32) * scale).astype(self.dtype)
