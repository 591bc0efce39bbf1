"""Choosing the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; what is None, 0 or 1 by default changes nothing.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token always.
      top_k: only so many of the likeliest tokens are left.
      top_p: only the likeliest tokens that together have this probability (arXiv 1904.09751).
      min_p: only tokens at least so likely as this share of the likeliest (arXiv 2407.01082).
      repetition_penalty: positive logits of tokens that were there before, in the prompt too, are
        divided by it, negative ones multiplied (arXiv 1909.05858, section 4.1).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, is_good, accepted in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not is_good:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is {accepted}.")


def left_after_filters(logits: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits as sampled from: by penalty and temperature, -inf for what a filter leaves out.

    The filters go one after another, each by the probabilities that the one before left.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that were there before.
      sampling: how; with temperature 0 only the penalty counts.

    Returns:
      [B, V] float32, at least one of each row finite.
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits
    # From the largest one down: a tiny temperature must not make infinities of several.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, seen: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, by a key of its own.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that were there before.
      keys: [B] typed PRNG keys.
      sampling: how.

    Returns:
      [B] int32.
    """
    logits = left_after_filters(logits, seen, sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
