"""The short causal convolution before a state-space scan."""

from typing import cast

import jax
from flax import nnx

from kernels.causal_conv import causal_conv


def convolve(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Return the convolution of x [B, T, E] with taps [W, E], within each document."""
    return cast("jax.Array", causal_conv(x, weight, bias, segment_ids=segment_ids))


def value_of(bias: nnx.Param[jax.Array] | None) -> jax.Array | None:
    """Return the array of a bias; None for None."""
    return None if bias is None else bias[...]


def convolve_step(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return silu of the convolution at one token [B, E], and the inputs for the next token.

    Args:
      x: [B, E], the token.
      weight: [W, E], the taps.
      bias: [E]; None: zero.
      inputs: [B, W - 1, E], the tokens before it.
    """
    y, new_inputs = causal_conv(
        x[:, None], weight, bias, initial_state=inputs, return_final_state=True
    )
    return jax.nn.silu(y[:, 0]), new_inputs
