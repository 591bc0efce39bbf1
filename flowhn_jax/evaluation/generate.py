"""Text generation with caches: one prefill for each bucket of lengths, one step for all."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.data.tokenizer import Tokenizer, begin, load_tokenizer, recipe_vocab_size
from flowhn_jax.evaluation.sampling import Sampling, sample
from flowhn_jax.evaluation.text_stream import TextStream
from flowhn_jax.models import DecodeCache, Params

# Told the number of a prompt and what its text goes on with.
OnText = Callable[[int, str], None]

_LEAST_BUCKET, _LEAST_CACHE = 16, 128
_IDS_BEFORE = 8  # of a prompt, that the text of the first tokens may depend on


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated behind one prompt.

    Attributes:
      prompt: the text before it.
      text: without the prompt, the stop string and the end-of-text token.
      tokens: how many were generated.
      finish: 'stop' (a stop string came), 'end_of_text', 'length' (max_new_tokens) or 'context'
        (the split is planned for no further position).
    """

    prompt: str
    text: str
    tokens: int
    finish: str


@dataclasses.dataclass
class _Row:
    """A sequence that is being generated."""

    index: int
    window: list[int]  # tokens that the model sees
    stream: TextStream
    tokens: int = 0
    finish: str | None = None


@dataclasses.dataclass
class Clock:
    """Seconds of decoding, and the tokens in them; what is compiled and the prefills left out."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """None where there was nothing to time."""
        return self.tokens / self.seconds if self.tokens else None


def bucket(length: int, most: int | None = None) -> int:
    """`length` rounded up to a power of two, at least 16 and at most `most`."""
    size = max(_LEAST_BUCKET, 1 << (length - 1).bit_length())
    return size if most is None else min(size, most)


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 16,
    replan: bool = False,
    on_text: OnText | None = None,
    clock: Clock | None = None,
) -> list[Generation]:
    """Continues texts.

    A prompt is a document from its beginning. The same prompt at the same place among the prompts
    with the same seed gives the same text, in whatever batches.

    Args:
      config: of a model for which `models.can_decode` holds.
      params: as of `models.init`, or of a checkpoint.
      prompts: texts, none empty; or their ids, with the one that begins a text if there is one.
      tokenizer: that of the training data; None: bytes.
      max_new_tokens: the most that are generated for each.
      sampling: how tokens are chosen; None: from the model's own distribution.
      stop: strings that end a text, and are left out of it.
      seed: of the sampling.
      batch_size: prompts that are generated side by side.
      replan: go on behind the context of a split that is tied to it, in a new window that begins
        with the last half of the context.
      on_text: is given each piece of text when it is settled.
      clock: receives the time of decoding.

    Returns:
      A Generation for each prompt.

    Raises:
      ValueError: an empty prompt, ids beyond the vocabulary, a prompt that fills the context of a
        split tied to it, an argument out of range, or a tokenizer with more tokens than the model.
    """
    tokenizer = load_tokenizer("bytes") if tokenizer is None else tokenizer
    sampling = Sampling() if sampling is None else sampling
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted is 1 or more.")
    if "" in stop:
        raise ValueError("A stop string is empty; accepted are strings that can come.")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with, or train "
            f"with --config.model.vocab_size={recipe_vocab_size(tokenizer)}"
        )
    if replan and config.max_length is None:
        raise ValueError(
            f"replan is for splits tied to their context; {config.name} goes on without it."
        )
    rows, texts = [], []
    for index, prompt in enumerate(prompts):
        ids = _encoded(index, prompt, tokenizer, config)
        texts.append(prompt if isinstance(prompt, str) else tokenizer.decode(ids))
        rows.append(_Row(index, ids, TextStream(tokenizer, stop, ids[-_IDS_BEFORE:])))
    params = models.for_inference(config, params)
    by_length = sorted(rows, key=lambda row: len(row.window))
    for start in range(0, len(rows), batch_size):
        _run_batch(
            by_length[start : start + batch_size],
            min(batch_size, len(rows)),
            config,
            params,
            tokenizer,
            partial(_advance, config, sampling, tokenizer.vocab_size, params, jax.random.key(seed)),
            max_new_tokens,
            replan,
            on_text or (lambda index, piece: None),
            clock or Clock(),
        )
    return [
        Generation(prompt, row.stream.text, row.tokens, row.finish)
        for prompt, row in zip(texts, rows, strict=True)
    ]


def _encoded(
    index: int, prompt: str | Sequence[int], tokenizer: Tokenizer, config: ModelConfig
) -> list[int]:
    """Return the prompt's ids, which begin as the tokenizer's texts do."""
    if len(prompt) == 0:
        raise ValueError(f"Prompt {index + 1} is empty; accepted is a text.")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Prompt {index + 1} is not UTF-8 text: {error.reason}.") from error
        ids = begin(tokenizer, tokenizer.encode(prompt))
        if not ids:
            raise ValueError(f"Prompt {index + 1} has no token; accepted is a text that has one.")
    else:
        ids = list(map(int, prompt))
        if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise ValueError(
                f"Prompt {index + 1} has ids from {min(ids)} to {max(ids)}; accepted are 0 to "
                f"{tokenizer.vocab_size - 1}."
            )
    if config.max_length is not None and len(ids) > config.max_length:
        raise ValueError(
            f"Prompt {index + 1} has {len(ids)} tokens with the one that begins it, but "
            f"{config.name} was planned for a context of {config.max_length}; accepted is at most "
            "that many."
        )
    return ids


def _run_batch(
    rows: Sequence[_Row],
    batch: int,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    advance: Callable,
    max_new_tokens: int,
    replan: bool,
    on_text: OnText,
    clock: Clock,
) -> None:
    """Generates behind `rows`, which become `batch` by copies of the first."""
    numbers = jnp.asarray([row.index for row in _filled(rows, batch)])
    seen = np.zeros((batch, config.vocab_size), bool)
    for place, row in enumerate(_filled(rows, batch)):
        begins = row.window[0] == tokenizer.eot_id  # which is ours, not the prompt's
        seen[place, row.window[begins:]] = True
    longest = max(len(row.window) for row in rows)
    # As long as is needed, in a few sizes, whatever the model could reach; a new window needs all.
    needed = bucket(max(_LEAST_CACHE, longest + max_new_tokens), config.max_length)
    length = config.max_length if replan and config.max_length else needed
    logits, cache = _prefill(config, params, _filled(rows, batch), length)
    state = logits, cache, jnp.asarray(seen)
    for step in range(max_new_tokens):
        start = time.perf_counter()
        chosen, state = advance(*state, numbers, step)
        chosen = np.asarray(chosen)
        going = [row for row in rows if row.finish is None]
        if step:  # the first one may have been compiled
            clock.seconds += time.perf_counter() - start
            clock.tokens += len(going)
        for row, token in zip(rows, chosen, strict=False):
            if row.finish is None:
                _take(row, int(token), tokenizer, max_new_tokens, on_text)
        full = [row for row in rows if row.finish is None and _is_full(row, config)]
        for row in full:
            if replan:
                row.window = row.window[-(config.max_length // 2) :]
            else:
                row.finish = "context"
                on_text(row.index, row.stream.finish())
        if all(row.finish is not None for row in rows):
            return
        if full and replan:
            # What a window holds is all that its cache would: nothing changes for the others.
            logits, cache = _prefill(config, params, _filled(rows, batch), length)
            state = logits, cache, state[2]


def _filled(rows: Sequence[_Row], batch: int) -> list[_Row]:
    return [*rows, *[rows[0]] * (batch - len(rows))]


def _is_full(row: _Row, config: ModelConfig) -> bool:
    """Whether the last token has no position left."""
    return config.max_length is not None and len(row.window) > config.max_length


def _take(
    row: _Row, token: int, tokenizer: Tokenizer, max_new_tokens: int, on_text: OnText
) -> None:
    row.window.append(token)
    row.tokens += 1
    if token == tokenizer.eot_id:
        row.finish = "end_of_text"
    elif piece := row.stream.push(token):
        on_text(row.index, piece)
    if row.stream.stopped:
        row.finish = "stop"
    elif row.finish is None and row.tokens == max_new_tokens:
        row.finish = "length"
    if row.finish is not None and (rest := row.stream.finish()):
        on_text(row.index, rest)


def _prefill(
    config: ModelConfig, params: Params, rows: Sequence[_Row], length: int
) -> tuple[jax.Array, DecodeCache]:
    """Logits and cache behind the windows; a finished one is cut to what there is room for."""
    windows = [row.window[:length] for row in rows]
    lengths = np.array([len(window) for window in windows])
    tokens = np.zeros((len(rows), bucket(int(lengths.max()), length)), np.int32)
    for place, window in enumerate(windows):
        tokens[place, : len(window)] = window
    return models.prefill(config, params, tokens, lengths, length=length)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6, 7))
def _advance(
    config: ModelConfig,
    sampling: Sampling,
    vocab_size: int,
    params: Params,
    key: jax.Array,
    logits: jax.Array,
    cache: DecodeCache,
    seen: jax.Array,
    numbers: jax.Array,
    step: int,
) -> tuple[jax.Array, tuple[jax.Array, DecodeCache, jax.Array]]:
    """Chooses a token of each row, below `vocab_size`, and feeds it to the model."""
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(key, number), step))(
        numbers
    )
    known = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
    chosen = sample(known, seen, keys, sampling)
    seen = seen.at[jnp.arange(seen.shape[0]), chosen].set(True)
    logits, cache = models.step(config, params, chosen, cache)
    return chosen, (logits, cache, seen)
