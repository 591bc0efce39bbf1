"""Sampling the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution.

    Attributes:
      temperature: divides the logits; 0 always chooses the likeliest token.
      top_k: sample from the k likeliest tokens.
      top_p: sample from the likeliest tokens whose probabilities add up to p (arXiv 1904.09751).
      min_p: sample from tokens at least p times as likely as the likeliest (arXiv 2407.01082).
      repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens
        that occur in the prompt or the text so far (arXiv 1909.05858, section 4.1).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, is_valid, valid_range in (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {valid_range}; got {getattr(self, name)}.")


def filter_logits(logits: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the logits to sample from, [B, V] float32, -inf for tokens that are filtered out.

    The filters apply one after another, each to the distribution that the one before left. At least
    one logit of each row stays finite.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that occur in the prompt or the text so far.
      sampling: the filters; at temperature 0 only the penalty applies.
    """
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits
    # Shift the maximum to 0, so that a tiny temperature cannot turn several logits into infinities.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        threshold = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if sampling.min_p > 0:
        threshold = logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def sample(logits: jax.Array, seen: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Return the next token of each row, [B] int32.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens that occur in the prompt or the text so far.
      keys: [B] typed PRNG keys, one per row.
      sampling: how to choose.
    """
    logits = filter_logits(logits, seen, sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
