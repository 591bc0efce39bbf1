"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2), halves rotated as in Llama."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Turn the pairs (x_i, x_{i + K/2}) of each head by position * theta**(-2i / K), in float32.

    Args:
      x: queries or keys, [B, T, H, K] or, of one token a sequence, [B, H, K].
      positions: [T], [B] or [B, T], integer.
      theta: base of the frequencies.

    Returns:
      x's shape and dtype.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions[..., None] * frequencies)[..., None, :]  # [T, B or B, T; 1; K / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)
