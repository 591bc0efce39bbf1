"""Log-likelihoods of continuations, for tasks: batches by bucket of length, cut over the mesh."""

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

_LOGITS = 2**25  # numbers, 128 MiB, that exist at a time

# Told how many more pairs are scored.
OnScored = Callable[[int], None]


class Pair(NamedTuple):
    """Ids of what is given, not empty, and of what is scored."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """Of a continuation behind its context."""

    log_likelihood: float  # nats, summed over its tokens
    is_greedy: bool  # whether each of its tokens is the likeliest one
    is_cut: bool  # whether the context's beginning did not fit


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, parse_special: bool = False
) -> Pair:
    """Return the ids of both as one text, cut at the context's end: no token spans the border.

    Spaces at the context's end belong to the continuation, whose first token they are part of. The
    context begins as the tokenizer's texts do; an empty one of a tokenizer whose texts begin with
    nothing is its `prefix_id`.

    Args:
      tokenizer: the model's.
      context: what is given.
      continuation: what is scored.
      parse_special: as of `Tokenizer.encode`.

    Raises:
      ValueError: the continuation has no token of its own.
    """
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    before = tokenizer.encode(context, parse_special=parse_special)
    both = tokenizer.encode(context + continuation, parse_special=parse_special)
    if len(both) <= len(before):
        raise ValueError("the continuation has no token of its own")
    given = begin(tokenizer, both[: len(before)]) or [prefix_id(tokenizer)]
    return Pair(given, list(map(int, both[len(before) :])))


class Scorer:
    """Scores pairs by a model, longest first."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        mesh: Mesh,
        batch_size: int,
        context: int | None = None,
    ):
        """Reads at most `context` tokens of a pair, as many as the model's where it is None.

        `batch_size` sequences go through the model at a time; they divide over the mesh.
        """
        self.context = config.context if context is None else context
        self._mesh, self._batch_size = mesh, batch_size
        self._config, self._params = config, models.for_inference(config, params)

    def score(self, pairs: Sequence[Pair], on_scored: OnScored = lambda count: None) -> list[Score]:
        """A score for each pair, in their order.

        Of a pair of more than N + 1 tokens, N the context, the last N + 1 are read; a continuation
        of more than N is scored in its last N tokens.
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
    """Of tokens [B, T + 1]: log p summed over `scored` [B, T] targets, whether all are likeliest.

    The logits of a few positions of all rows are in memory at a time.
    """
    model = models.bind(config, params)
    hidden, head = model(tokens[:, :-1]), model.head.kernel[...]
    batch, length = scored.shape
    most = max(1, _LOGITS // (batch * head.shape[1]))
    chunk = math.gcd(length, 1 << (most.bit_length() - 1))

    def part(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, scored = inputs
        logits = jnp.einsum(
            "btd,dv->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_p = of_targets - jax.nn.logsumexp(logits, axis=-1)
        likeliest = logits.argmax(-1) == targets
        return jnp.where(scored, log_p, 0).sum(1), (likeliest | ~scored).all(1)

    def chunks(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length // chunk, chunk, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.tree.map(chunks, (hidden, tokens[:, 1:], scored))
    sums, greedy = jax.lax.map(part, parts)
    return sums.sum(0), greedy.all(0)


def standard_error(values: Sequence[float]) -> float:
    """Of the values' mean; 0 where there is one value."""
    count = len(values)
    if count < 2:
        return 0.0
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
