"""Perplexity and bits per byte: exact means over the tokens of a prepared set or of a text."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flowhn_jax.config import Config
from flowhn_jax.data.pipeline import validation_batches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch, loss_sum, target_weights
from flowhn_jax.parallel.mesh import batch_sharding, data_shard, shard_batch
from flowhn_jax.utils.limits import MAX_POSITIONS

BATCHES_IN_FLIGHT = 2  # given to the devices before the results are waited for


class LossSum(NamedTuple):
    """The loss of a batch, as sums over its targets.

    Attributes:
      nll: weighted negative log-likelihood in nats, float32 scalar.
      targets: weights of the targets, float32 scalar.
    """

    nll: jax.Array
    targets: jax.Array


EvalStep = Callable[[Params, Batch], LossSum]


@dataclasses.dataclass(frozen=True)
class Quality:
    """The quality of a model on a text: a mean over its tokens, and the text's size."""

    nll: float  # mean negative log-likelihood, nats per token
    tokens: int  # scored targets
    bytes: int  # UTF-8 bytes of their text

    @property
    def perplexity(self) -> float:
        """The exponential of the nll; infinite beyond the range of a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole text per byte, which are comparable between tokenizers."""
        return self.nll * self.tokens / math.log(2) / self.bytes

    def word_perplexity(self, words: int) -> float:
        """Return exp(nll of the whole text / words); infinite beyond the range of a float."""
        exponent = self.nll * self.tokens / words
        return math.exp(exponent) if exponent < 700 else math.inf

    def to_dict(self, words: int | None = None) -> dict[str, Any]:
        """Return the results that eval.py prints, with those per word if `words` is given."""
        per_word = {} if not words else {"word_perplexity": self.word_perplexity(words)}
        return {
            "nll": self.nll,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **per_word,
            "tokens": self.tokens,
            "bytes": self.bytes,
            **({} if not words else {"words": words}),
        }


def mean_quality(weights: Sequence[float], qualities: Sequence[Quality]) -> Quality:
    """Return the quality on a mixture of texts, of which each has a share of the tokens.

    Args:
      weights: the shares, which sum to 1.
      qualities: the qualities on the texts.
    """
    if len(qualities) == 1:
        return qualities[0]
    pairs = list(zip(weights, qualities, strict=True))
    tokens = sum(each.tokens for each in qualities)
    bytes_per_token = math.fsum(weight * each.bytes / each.tokens for weight, each in pairs)
    nll = math.fsum(weight * each.nll for weight, each in pairs)
    return Quality(nll, tokens, round(tokens * bytes_per_token))


def eval_batch_size(config: Config) -> int:
    """Return the number of sequences per forward pass: those of a training micro-batch."""
    return config.train.batch_size // config.train.accumulate


def make_eval_step(config: Config) -> EvalStep:
    """Return the jitted function of parameters and a batch to the batch's summed loss."""

    @jax.jit
    def eval_step(params: Params, batch: Batch) -> LossSum:
        return LossSum(loss_sum(config.model, params, batch), target_weights(batch).sum())

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[Batch],
    text_bytes: int,
    stops: Callable[[], bool] | None = None,
) -> Quality | None:
    """Return the quality of a model on batches of a text.

    Args:
      eval_step: as `make_eval_step` returns it.
      params: the model's parameters.
      batches: as `models.loss.loss_sum` takes them.
      text_bytes: UTF-8 bytes of the text.
      stops: called after each batch; when it returns True, the evaluation stops and returns None.
    """
    sums: list[LossSum] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        if len(sums) > BATCHES_IN_FLIGHT:  # so that a request to stop is noticed soon
            sums[-BATCHES_IN_FLIGHT].nll.block_until_ready()
        if stops is not None and stops():
            return None
    sums = jax.device_get(sums)
    tokens = round(math.fsum(float(part.targets) for part in sums))
    nll = math.fsum(float(part.nll) for part in sums)
    return Quality(nll / max(tokens, 1), tokens, text_bytes)


@dataclasses.dataclass(frozen=True)
class TextBatches:
    """Batches of windows of a text, in which each target is scored once.

    Window k reads the `context` tokens from k * stride on. It scores those of its targets that no
    earlier window has scored: all targets of the first window, then the last `stride`.

    Iterating yields dicts of tokens and segment_ids [batch_size, context + 1] int32 and weights
    [batch_size, context] float32. The last batch is filled up with padding.

    Attributes:
      tokens: [M + 1] ids; the first is only read.
      context: number of tokens that a window reads.
      stride: number of tokens between windows, 1 to `context`; a smaller stride is slower and gives
        each target a longer past.
      batch_size: windows per batch.
    """

    tokens: np.ndarray
    context: int
    stride: int
    batch_size: int

    @property
    def _windows(self) -> int:
        targets = len(self.tokens) - 1
        return 1 + max(0, -(-(targets - self.context) // self.stride))

    def __len__(self) -> int:
        return -(-self._windows // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, self._windows, self.batch_size):
            rows = [self._window(first + row) for row in range(self.batch_size)]
            tokens, weights = (np.stack(column) for column in zip(*rows, strict=True))
            yield {
                "tokens": tokens.astype(np.int32),
                "segment_ids": np.ones((self.batch_size, self.context + 1), np.int32),
                "weights": weights,
            }

    def _window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [context + 1] and the weights [context] of a window, or padding."""
        weights = np.zeros(self.context, np.float32)
        if index >= self._windows:
            return np.zeros(self.context + 1, np.int32), weights
        start = index * self.stride
        window = self.tokens[start : start + self.context + 1]
        scored = self.context - self.stride if index else 0  # targets of earlier windows
        weights[scored : len(window) - 1] = 1
        return np.pad(window, (0, self.context + 1 - len(window))), weights


def text_batches(
    config: Config, text: bytes, tokenizer: Tokenizer, context: int, stride: int
) -> TextBatches:
    """Return the batches that score a text as one document, including its first token.

    Raises:
      ValueError: the text is empty, or not UTF-8 where the tokenizer needs it; the context is
        longer than the split is planned for; the stride is not 1 to the context; or no token begins
        the tokenizer's texts, from which the first token could be predicted.
    """
    if not tokenizer.first_ids:
        raise ValueError(
            "--first_token must be bos or eot for perplexity, which also scores the first token of "
            "a text; got 'none', from the flag or from the tokenizer's own settings."
        )
    if not text:
        raise ValueError("The text to score must not be empty.")
    longest = config.model.max_length or MAX_POSITIONS
    if not 1 <= context <= longest:
        reason = (
            f", the context {config.model.name} is planned for" if config.model.max_length else ""
        )
        raise ValueError(f"--context must be 1 to {longest}{reason}; got {context}.")
    if not 1 <= stride <= context:
        raise ValueError(f"--stride must be 1 to the context, {context}; got {stride}.")
    tokens = np.concatenate([tokenizer.first_ids, tokenizer.encode(text)])
    return TextBatches(tokens, context, stride, eval_batch_size(config))


def place(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[Batch]:
    """Put batches, which every process holds in full, on the mesh."""
    return (jax.device_put(batch, batch_sharding(mesh)) for batch in batches)


def count_words(text: bytes) -> int:
    """Return the number of words between white space, the unit of WikiText's perplexity."""
    return len(text.decode(errors="replace").split())


def validation(
    config: Config, mesh: Mesh, prepared: PreparedSet, max_windows: int | None = None
) -> Iterator[Batch]:
    """Return batches of the validation windows; if `max_windows` is set, of evenly spaced ones."""
    part, parts = data_shard(mesh)
    batches = validation_batches(
        prepared,
        batch_size=eval_batch_size(config),
        process_index=part,
        process_count=parts,
        max_windows=max_windows,
    )
    return (shard_batch(batch, mesh) for batch in batches)


def count_validation_batches(
    config: Config, prepared: PreparedSet, max_windows: int | None = None
) -> int:
    """Return the number of batches that `validation` yields."""
    windows = len(prepared.windows("validation"))
    return -(-min(windows, max_windows or windows) // eval_batch_size(config))


def validate(
    config: Config,
    mesh: Mesh,
    eval_step: EvalStep,
    params: Params,
    prepared: PreparedSet,
    max_windows: int | None = None,
    stops: Callable[[], bool] | None = None,
    batches: Iterable[Batch] | None = None,
) -> Quality | None:
    """Return the quality of a model on the validation set, or None if `stops` returned True.

    Args:
      config: the run's config.
      mesh: the mesh for the batches.
      eval_step: as `make_eval_step` returns it.
      params: the model's parameters.
      prepared: the set.
      max_windows: score this many evenly spaced windows, whose bytes are estimated from their share
        of the targets; None: score all.
      stops: as in `evaluate`.
      batches: as `validation` returns them, where the caller has them already.
    """
    split = prepared.splits["validation"]
    if batches is None:
        batches = validation(config, mesh, prepared, max_windows)
    quality = evaluate(eval_step, params, batches, split.bytes, stops)
    if quality is None:
        return None
    share = quality.tokens / split.tokens
    return dataclasses.replace(quality, bytes=round(split.bytes * share))
