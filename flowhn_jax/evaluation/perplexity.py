"""Perplexity and bits per byte: exact means over tokens, of prepared windows or of a text."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flowhn_jax.config import Config
from flowhn_jax.data.pipeline import validation_batches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch, LossSum, loss_sum
from flowhn_jax.parallel.mesh import batch_sharding, data_shard, shard_batch
from flowhn_jax.utils.limits import MAX_POSITIONS

_BATCHES_AHEAD = 2  # that the devices have been given

EvalStep = Callable[[Params, Batch], LossSum]


@dataclasses.dataclass(frozen=True)
class Quality:
    """Token-weighted means over all targets."""

    nll: float  # nats per token
    tokens: int  # targets scored
    bytes: int  # UTF-8 bytes of the text that they are

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that is beyond a float."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total bits over the text's bytes: comparable between tokenizers."""
        return self.nll * self.tokens / math.log(2) / self.bytes

    def word_perplexity(self, words: int) -> float:
        """exp of the whole text's nll over its words; infinite where that is beyond a float."""
        exponent = self.nll * self.tokens / words
        return math.exp(exponent) if exponent < 700 else math.inf

    def to_dict(self, words: int | None = None) -> dict[str, Any]:
        """The public contract's keys, and the words' perplexity where their number is known."""
        of_words = {} if not words else {"word_perplexity": self.word_perplexity(words)}
        return {
            "nll": self.nll,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **of_words,
            "tokens": self.tokens,
            "bytes": self.bytes,
            **({} if not words else {"words": words}),
        }


def eval_batch_size(config: Config) -> int:
    """Sequences a forward pass: those of a training micro-batch."""
    return config.train.batch_size // config.train.accumulate


def make_eval_step(config: Config) -> EvalStep:
    """The jitted forward pass of a batch to its summed loss."""
    return jax.jit(lambda params, batch: loss_sum(config.model, params, batch))


def evaluate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[Batch],
    text_bytes: int,
    stops: Callable[[], bool] | None = None,
) -> Quality | None:
    """Scores batches (as of `models.loss.loss_sum`) of a text of `text_bytes` bytes.

    `stops` is asked behind each batch; None is returned where it says so.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        if len(sums) > _BATCHES_AHEAD:  # so that a request to stop is heeded soon
            sums[-_BATCHES_AHEAD].nll.block_until_ready()
        if stops is not None and stops():
            return None
    sums = jax.device_get(sums)
    tokens = round(math.fsum(float(part.targets) for part in sums))
    nll = math.fsum(float(part.nll) for part in sums)
    return Quality(nll / max(tokens, 1), tokens, text_bytes)


def text_windows(
    tokens: np.ndarray, context: int, stride: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cuts a text into windows whose targets are each scored once.

    Window k reads the `context` tokens from k * stride on and scores those of its targets that no
    window before it has scored: all of the first window's, then the last `stride`.

    Args:
      tokens: [M + 1], the first of which is only read.
      context: N, tokens that a window reads.
      stride: tokens between windows, 1 to `context`. Smaller is slower, and gives each token a
        longer past.
      batch_size: windows a batch; the last batch is filled up with padding.

    Yields:
      tokens and segment_ids [batch_size, N + 1] int32 and weights [batch_size, N] float32.
    """
    targets = len(tokens) - 1
    rows = []
    scored = 0
    for start in itertools.count(0, stride):
        window = tokens[start : start + context + 1]
        end = start + len(window) - 1  # targets up to here are scored with this window
        weights = np.zeros(context, np.float32)
        weights[scored - start : end - start] = 1
        rows.append((np.pad(window, (0, context + 1 - len(window))), weights))
        scored = end
        done = scored == targets
        if done:
            padding = np.zeros(context + 1, np.int32), np.zeros(context, np.float32)
            rows += [padding] * (-len(rows) % batch_size)
        if len(rows) == batch_size:
            stacked = [np.stack(column) for column in zip(*rows, strict=True)]
            yield {
                "tokens": stacked[0].astype(np.int32),
                "segment_ids": np.ones((batch_size, context + 1), np.int32),
                "weights": stacked[1],
            }
            rows = []
        if done:
            return


def windows_of(
    config: Config, text: bytes, tokenizer: Tokenizer, context: int, stride: int
) -> Iterator[dict[str, np.ndarray]]:
    """Windows that score a text as one document, the first token from the one that begins a text.

    Raises:
      ValueError: an empty text, one that is not UTF-8 where the tokenizer must know, a context that
        the split does not reach, a stride outside 1 to the context, or a tokenizer whose texts
        begin with nothing.
    """
    if not tokenizer.first_ids:
        raise ValueError(
            "first_token must be auto, bos or eot for a perplexity, which scores the text's first "
            "token too; got 'none'."
        )
    if not text:
        raise ValueError("The text is empty; there is nothing to score.")
    most = config.model.max_length or MAX_POSITIONS
    if not 1 <= context <= most:
        reason = f", which {config.model.name} is for" if config.model.max_length else ""
        raise ValueError(f"The context is {context}; accepted is 1 to {most}{reason}.")
    if not 1 <= stride <= context:
        raise ValueError(f"The stride is {stride}; accepted is 1 to the context, {context}.")
    tokens = np.concatenate([tokenizer.first_ids, tokenizer.encode(text)])
    return text_windows(tokens, context, stride, eval_batch_size(config))


def placed(windows: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[Batch]:
    """Windows that every process has, on the mesh."""
    return (jax.device_put(window, batch_sharding(mesh)) for window in windows)


def count_words(text: bytes) -> int:
    """What white space separates, the unit of WikiText's perplexity."""
    return len(text.decode(errors="replace").split())


def validation(
    config: Config, mesh: Mesh, prepared: PreparedSet, max_windows: int | None = None
) -> Iterator[Batch]:
    """The validation windows, or `max_windows` of them evenly spaced, on the mesh."""
    part, parts = data_shard(mesh)
    batches = validation_batches(
        prepared,
        batch_size=eval_batch_size(config),
        process_index=part,
        process_count=parts,
        max_windows=max_windows,
    )
    return (shard_batch(batch, mesh) for batch in batches)


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
    """Scores the validation windows, or `max_windows` of them evenly spaced.

    For a part of the set the bytes are taken in proportion to the targets. None where `stops`, as
    of `evaluate`, says so. `batches` are those of `validation`, where the caller has them.
    """
    split = prepared.splits["validation"]
    if batches is None:
        batches = validation(config, mesh, prepared, max_windows)
    quality = evaluate(eval_step, params, batches, split.bytes, stops)
    if quality is None:
        return None
    share = quality.tokens / split.tokens
    return dataclasses.replace(quality, bytes=round(split.bytes * share))
