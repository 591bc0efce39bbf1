"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2), halves rotated as in Llama."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Return x with the pairs (x_i, x_{i + K/2}) rotated by position * theta**(-2i / K).

    Args:
      x: queries or keys, [B, T, H, K], or [B, H, K] for one token per sequence.
      positions: [T], [B] or [B, T], integer.
      theta: base of the frequencies.

    Returns:
      Rotated values of x's shape and dtype, computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (positions[..., None] * frequencies)[..., None, :]  # [T, B or B, T; 1; K / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
