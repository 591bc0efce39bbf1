"""Log-likelihoods of continuations, for tasks: bucketed by length, sharded over the mesh."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.data.tokenizer import Tokenizer, begin, prefix_id
from flowhn_jax.evaluation.generate import bucket
from flowhn_jax.models import Params
from flowhn_jax.parallel.mesh import batch_sharding

_MAX_LOGITS = 2**25  # in memory at a time; 128 MiB in float32

# Receives how many more pairs are scored.
OnScored = Callable[[int], None]


class Pair(NamedTuple):
    """Ids of a context, which is not empty, and of the continuation to score."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """The score of a continuation after its context."""

    log_likelihood: float  # nats, summed over the continuation's tokens
    is_greedy: bool  # whether greedy decoding gives the continuation
    is_truncated: bool  # whether the beginning of the context did not fit


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, parse_special: bool = False
) -> Pair:
    """Return the ids of context and continuation, encoded as one text.

    Spaces at the end of the context move to the continuation, whose first token includes them. The
    context starts with the token that begins a text; where there is no such token, an empty context
    becomes `prefix_id`.

    Args:
      tokenizer: the model's tokenizer.
      context: the given text.
      continuation: the text to score.
      parse_special: whether names of special tokens in the texts stand for these tokens.

    Raises:
      ValueError: the continuation adds no token to the context.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    before = tokenizer.encode(context, parse_special=parse_special)
    both = tokenizer.encode(context + continuation, parse_special=parse_special)
    if len(both) <= len(before):
        raise ValueError("the continuation must add a token to the context; it adds none")
    ids = both.tolist()
    given = begin(tokenizer, ids[: len(before)]) or [prefix_id(tokenizer)]
    return Pair(given, ids[len(before) :])


class Scorer:
    """Scores pairs with a model, longest first."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        batch_size: int,
        context: int | None = None,
    ):
        """Hold a model for scoring.

        Args:
          config: the model's config.
          params: the model's parameters.
          mesh: batches are sharded over it.
          batch_size: sequences per batch; a multiple of the mesh's data axes.
          context: maximum number of tokens read of a pair; None: the model's context.
        """
        self.context = config.context if context is None else context
        self._mesh, self._batch_size = mesh, batch_size
        self._config, self._params = config, models.for_inference(config, params)

    def score(self, pairs: Sequence[Pair], on_scored: OnScored = lambda count: None) -> list[Score]:
        """Return the score of each pair, in order.

        With a context of N tokens, only the last N + 1 tokens of a longer pair are read, and only
        the last N tokens of a longer continuation are scored.
        """
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            for index, score in zip(part, self._batch([pairs[i] for i in part]), strict=True):
                scores[index] = score
            on_scored(len(part))
        return [scores[index] for index in range(len(pairs))]

    def _batch(self, pairs: Sequence[Pair]) -> list[Score]:
        rows = [(pair.context + pair.continuation)[-self.context - 1 :] for pair in pairs]
        columns = bucket(max(map(len, rows)) - 1, self.context)
        tokens = np.zeros((self._batch_size, columns + 1), np.int32)
        scored = np.zeros((self._batch_size, columns), bool)
        for place, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            tokens[place, : len(row)] = row
            first = max(0, len(row) - 1 - len(pair.continuation))
            scored[place, first : len(row) - 1] = True
        with jax.set_mesh(self._mesh):
            placed = jax.device_put((tokens, scored), batch_sharding(self._mesh))
            sums, greedy = jax.device_get(_score(self._config, self._params, *placed))
        return [
            Score(float(total), bool(likeliest), sum(map(len, pair)) > len(row))
            for total, likeliest, pair, row in zip(sums, greedy, pairs, rows, strict=False)
        ]


@partial(jax.jit, static_argnums=0)
def _score(
    config: ModelConfig, params: Params, tokens: jax.Array, scored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the log-likelihoods [B] of the scored targets, and whether all are likeliest, [B].

    Only the logits of a chunk of positions are in memory at a time.

    Args:
      config: the model's config.
      params: the model's parameters.
      tokens: [B, T + 1] int32.
      scored: [B, T] bool, which targets count.
    """
    model = models.bind(config, params)
    hidden, head = model(tokens[:, :-1]), model.head_kernel()
    batch, length = scored.shape
    max_positions = max(1, _MAX_LOGITS // (batch * head.shape[1]))
    chunk = math.gcd(length, 1 << (max_positions.bit_length() - 1))

    def score_chunk(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, scored = inputs
        logits = jnp.einsum(
            "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_p = target_logits - jax.nn.logsumexp(logits, axis=-1)
        likeliest = logits.argmax(-1) == targets
        return jnp.where(scored, log_p, 0).sum(1), (likeliest | ~scored).all(1)

    def split_chunks(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    chunks = jax.tree.map(split_chunks, (hidden, tokens[:, 1:], scored))
    sums, greedy = jax.lax.map(score_chunk, chunks)
    return sums.sum(0), greedy.all(0)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the values' mean; 0 for a single value."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
