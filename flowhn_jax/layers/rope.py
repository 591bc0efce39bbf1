"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2), halves rotated as in Llama."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from flowhn_jax.utils.checks import require, require_positive
from flowhn_jax.utils.text import short_repr

# The keys besides `type` that each type of scaling reads.
_READ = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_context"),
    "yarn": (
        *("factor", "original_context", "attention_factor"),
        *("beta_fast", "beta_slow", "truncate"),
    ),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
}
_PREFIX = "model.rope_scaling"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies differ from those of the rotary base, as in transformers.

    Attributes:
      type: 'none'; 'linear', all frequencies divided by the factor (arXiv 2306.15595); 'yarn', the
        low ones divided and the scores scaled (arXiv 2309.00071); 'llama3', the low ones divided,
        as in Llama 3.1; 'dynamic', a base that grows with the length of a row beyond the original
        context (dynamic NTK), which model.context must not exceed.
      factor: the factor by which the context is longer than the original one.
      original_context: tokens of the context before scaling, for all types but linear.
      low_freq_factor: rotations in the original context up to which llama3 divides frequencies.
      high_freq_factor: rotations in the original context from which llama3 keeps frequencies.
      attention_factor: yarn's factor on rotated queries and keys; None: 0.1 log(factor) + 1.
      beta_fast: rotations in the original context from which yarn keeps frequencies.
      beta_slow: rotations in the original context up to which yarn divides frequencies.
      truncate: whether yarn rounds the range of the frequencies in between to whole ones.
    """

    type: str = "none"
    factor: float = 1.0
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        require(self.type in _READ, f"{_PREFIX}.type", f"one of {', '.join(_READ)}", self.type)
        read = _READ[self.type]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("type", *read) and value != field.default:
                raise ValueError(
                    f"{_PREFIX}.{field.name} must be its default, {short_repr(field.default)}, for "
                    f"{_PREFIX}.type {self.type!r}, which does not read it; got "
                    f"{short_repr(value)}."
                )
        if "original_context" in read:
            original = self.original_context
            expected = f"the tokens of the context before scaling, above 0, for {self.type!r}"
            is_valid = original is not None and original > 0
            require(is_valid, f"{_PREFIX}.original_context", expected, original)
        numbers = "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"
        require_positive(self, _PREFIX, *numbers)
        scale = self.attention_factor
        expected = "above 0, or None"
        require(scale is None or scale > 0, f"{_PREFIX}.attention_factor", expected, scale)
        low, high = self.low_freq_factor, self.high_freq_factor
        expected = f"above {_PREFIX}.low_freq_factor ({low:g})"
        require(high > low, f"{_PREFIX}.high_freq_factor", expected, high)

    @property
    def rotation_factor(self) -> float:
        """The factor on rotated queries and keys."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return yarn_factor(self.factor)

    def frequencies(self, half: int, theta: float, length: int) -> jax.Array:
        """Return the angles per position [half] of heads of size 2 * half, in float32.

        Args:
          half: number of frequencies.
          theta: base of the frequencies.
          length: tokens of a row, on which only dynamic scaling depends.
        """
        if self.type == "dynamic":
            assert self.original_context is not None
            stretch = self.factor * max(length / self.original_context, 1.0) - (self.factor - 1)
            theta *= stretch ** (half / (half - 1))
        plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        if self.type == "linear":
            return plain / self.factor
        if self.type == "yarn":
            return self._between(plain, self._yarn_shares(half, theta))
        if self.type == "llama3":
            assert self.original_context is not None
            rotations = self.original_context / (2 * math.pi) * plain
            low, high = self.low_freq_factor, self.high_freq_factor
            return self._between(plain, jnp.clip((rotations - low) / (high - low), 0, 1))
        return plain

    def _between(self, plain: jax.Array, shares: jax.Array) -> jax.Array:
        """Return frequencies of which a share is kept, and the rest divided by the factor."""
        return plain * shares + plain / self.factor * (1 - shares)

    def _yarn_shares(self, half: int, theta: float) -> jax.Array:
        assert self.original_context is not None
        most_rotations = self.original_context / (2 * math.pi)

        def index_of(rotations: float) -> float:
            return half * math.log(most_rotations / rotations) / math.log(theta)

        first, last = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        last += 0.001 if first == last else 0
        return 1 - jnp.clip((jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0, 1)


def yarn_factor(factor: float, weight: float = 1.0) -> float:
    """Return yarn's factor on queries and keys: 0.1 * weight * log(factor) + 1, at least 1."""
    return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


UNSCALED = RopeScaling()


def rotate(
    x: jax.Array,
    positions: jax.Array,
    theta: float,
    scaling: RopeScaling = UNSCALED,
    length: int = 0,
) -> jax.Array:
    """Return x with the pairs (x_i, x_{i + K/2}) rotated by position * theta**(-2i / K).

    Args:
      x: queries or keys, [B, T, H, K], or [B, H, K] for one token per sequence.
      positions: [T], [B] or [B, T], integer.
      theta: base of the frequencies.
      scaling: changes the frequencies, and may scale the result.
      length: tokens of the row that x is from, which only dynamic scaling needs; 0: no more than
        its original context.

    Returns:
      Rotated values of x's shape and dtype, computed in float32.
    """
    frequencies = scaling.frequencies(x.shape[-1] // 2, theta, length)
    angles = (positions[..., None] * frequencies)[..., None, :]  # [T, B or B, T; 1; K / 2]
    cos, sin = (scaling.rotation_factor * wave(angles) for wave in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
