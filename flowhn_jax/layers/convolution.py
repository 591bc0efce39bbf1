"""The short causal convolution before a state-space scan."""

from typing import cast

import jax

from kernels.causal_conv import causal_conv


def convolve(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """Return the convolution of x [B, T, E] with taps [W, E], within each document."""
    return cast("jax.Array", causal_conv(x, weight, bias, segment_ids=segment_ids))


def convolve_step(
    x: jax.Array, weight: jax.Array, bias: jax.Array, inputs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return silu of the convolution at one token [B, E], and the inputs for the next token.

    Args:
      x: [B, E], the token.
      weight: [W, E], the taps.
      bias: [E].
      inputs: [B, W - 1, E], the tokens before it.
    """
    y, new_inputs = causal_conv(
        x[:, None], weight, bias, initial_state=inputs, return_final_state=True
    )
    return jax.nn.silu(y[:, 0]), new_inputs
