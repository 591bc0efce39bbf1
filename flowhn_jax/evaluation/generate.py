"""Text generation with caches: one compiled prefill per bucket of lengths, one compiled step."""

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

# Receives the index of a prompt and the next piece of its text.
OnText = Callable[[int, str], None]
# Receives how many more of the `len(prompts) * max_new_tokens` tokens are done. Those that are left
# when a text ends count as done.
OnProgress = Callable[[int], None]

_MIN_BUCKET, _MIN_CACHE = 16, 128
_IDS_BEFORE = 8  # last ids of a prompt, which the text of the first tokens may depend on


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of one prompt.

    Attributes:
      prompt: the text that is continued.
      text: the continuation, without the stop string and the end-of-text token.
      tokens: number of generated tokens.
      finish: why the text ends: 'stop' (a stop string), 'end_of_text', 'length' (max_new_tokens) or
        'context' (the split is planned for no further position).
    """

    prompt: str
    text: str
    tokens: int
    finish: str


@dataclasses.dataclass
class _Row:
    """A sequence being generated."""

    index: int  # of its prompt
    window: list[int]  # tokens that the model sees
    stream: TextStream
    tokens: int = 0
    finish: str | None = None


@dataclasses.dataclass
class Clock:
    """Seconds of decoding and the tokens decoded in them, without compilation and prefill."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second; None if nothing was timed."""
        return self.tokens / self.seconds if self.tokens else None


def bucket(length: int, max_length: int | None = None) -> int:
    """Return `length` rounded up to a power of two, at least 16 and at most `max_length`."""
    size = max(_MIN_BUCKET, 1 << (length - 1).bit_length())
    return size if max_length is None else min(size, max_length)


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
    on_progress: OnProgress | None = None,
) -> list[Generation]:
    """Return a continuation of each prompt.

    Each prompt is the beginning of a document. Its text depends only on the prompt, its index and
    the seed, not on the batch size.

    Args:
      config: a model for which `models.can_decode` holds.
      params: the model's parameters, as `models.init` or a checkpoint gives them.
      prompts: non-empty texts or lists of ids; ids include the token that begins a text, if the
        tokenizer has one.
      tokenizer: the tokenizer of the training data; None: bytes.
      max_new_tokens: maximum number of generated tokens per prompt.
      sampling: how tokens are chosen; None: from the model's own distribution.
      stop: strings that end a text; they are left out of it.
      seed: seed of the sampling.
      batch_size: prompts that are continued at the same time.
      replan: continue beyond the context of a split tied to it, in a new window that starts with
        the last half of the old one.
      on_text: receives each piece of text as soon as it is final.
      clock: receives the time of decoding.
      on_progress: receives the number of tokens done since the last call.

    Raises:
      ValueError: a prompt is empty, has ids outside the vocabulary or does not fit the context of a
        split tied to it; an argument is out of range; or the tokenizer has more tokens than the
        model.
    """
    tokenizer = load_tokenizer("bytes") if tokenizer is None else tokenizer
    sampling = Sampling() if sampling is None else sampling
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}.")
    if "" in stop:
        raise ValueError("Every stop string must have a character; got ''.")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size} tokens; got "
            f"{config.vocab_size}. Use the tokenizer the model was trained with, or train with "
            f"--config.model.vocab_size={recipe_vocab_size(tokenizer)}"
        )
    if replan and config.max_length is None:
        raise ValueError(
            f"replan is for splits tied to their context; {config.name} continues without it."
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
            on_progress or (lambda count: None),
        )
    return [_generation(prompt, row) for prompt, row in zip(texts, rows, strict=True)]


def _generation(prompt: str, row: _Row) -> Generation:
    assert row.finish is not None
    return Generation(prompt, row.stream.text, row.tokens, row.finish)


def _encoded(
    index: int, prompt: str | Sequence[int], tokenizer: Tokenizer, config: ModelConfig
) -> list[int]:
    """Return the prompt's ids, starting with the token that begins the tokenizer's texts."""
    if len(prompt) == 0:
        raise ValueError(f"Prompt {index + 1} must not be empty.")
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Prompt {index + 1} must be UTF-8 text: {error.reason}.") from error
        ids = begin(tokenizer, tokenizer.encode(prompt).tolist())
        if not ids:
            raise ValueError(f"Prompt {index + 1} must have at least one token; it has none.")
    else:
        ids = list(map(int, prompt))
        if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise ValueError(
                f"The ids of prompt {index + 1} must be 0 to {tokenizer.vocab_size - 1}; got "
                f"{min(ids)} to {max(ids)}."
            )
    if config.max_length is not None and len(ids) > config.max_length:
        raise ValueError(
            f"Prompt {index + 1} must have at most {config.max_length} tokens, the context that "
            f"{config.name} is planned for; got {len(ids)}, including the token that begins it."
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
    on_progress: OnProgress,
) -> None:
    """Continue `rows`, padded to `batch` rows with copies of the first."""
    prompt_indices = jnp.asarray([row.index for row in _padded(rows, batch)])
    seen = np.zeros((batch, config.vocab_size), bool)
    for place, row in enumerate(_padded(rows, batch)):
        # An end-of-text token at the beginning is ours, not the prompt's.
        first = int(row.window[0] == tokenizer.eot_id)
        seen[place, row.window[first:]] = True
    longest = max(len(row.window) for row in rows)
    # The cache is as long as these texts need, in few sizes; a new window needs the whole context.
    needed = bucket(max(_MIN_CACHE, longest + max_new_tokens), config.max_length)
    length = config.max_length if replan and config.max_length else needed
    logits, cache = _prefill(config, params, _padded(rows, batch), length)
    state = logits, cache, jnp.asarray(seen)
    for step in range(max_new_tokens):
        start = time.perf_counter()
        chosen, state = advance(*state, prompt_indices, step)
        chosen = np.asarray(chosen)
        live = [row for row in rows if row.finish is None]
        if step:  # the first step may have been compiled
            clock.seconds += time.perf_counter() - start
            clock.tokens += len(live)
        for row, token in zip(rows, chosen, strict=False):
            if row.finish is None:
                _append(row, int(token), tokenizer, max_new_tokens, on_text)
        new_windows = False
        for row in live:
            # `max_length` positions are planned for; the last token has none left.
            if row.finish is None and config.max_length and len(row.window) > config.max_length:
                if replan:
                    row.window = row.window[-(config.max_length // 2) :]
                    new_windows = True
                else:
                    _end(row, "context", on_text)
        on_progress(sum(1 if row.finish is None else max_new_tokens - step for row in live))
        if all(row.finish is not None for row in rows):
            return
        if new_windows:
            # A row's window holds all that its cache holds, so the other rows do not change.
            logits, cache = _prefill(config, params, _padded(rows, batch), length)
            state = logits, cache, state[2]


def _padded(rows: Sequence[_Row], batch: int) -> list[_Row]:
    return [*rows, *[rows[0]] * (batch - len(rows))]


def _append(
    row: _Row, token: int, tokenizer: Tokenizer, max_new_tokens: int, on_text: OnText
) -> None:
    """Append a generated token to a row, and end the row's text where it is complete."""
    row.window.append(token)
    row.tokens += 1
    if token == tokenizer.eot_id:
        _end(row, "end_of_text", on_text)
        return
    if piece := row.stream.push(token):
        on_text(row.index, piece)
    if row.stream.stopped or row.tokens == max_new_tokens:
        _end(row, "length", on_text)


def _end(row: _Row, finish: str, on_text: OnText) -> None:
    """End a row's text for a reason, which gives way to a stop string in the text so far."""
    if rest := row.stream.finish():
        on_text(row.index, rest)
    row.finish = "stop" if row.stream.stopped else finish


def _prefill(
    config: ModelConfig, params: Params, rows: Sequence[_Row], length: int
) -> tuple[jax.Array, DecodeCache]:
    """Return the logits and the cache after the rows' windows, finished ones cut to `length`."""
    windows = [row.window[:length] for row in rows]
    lengths = np.array([len(window) for window in windows])
    tokens = np.zeros((len(rows), bucket(int(lengths.max()), length)), np.int32)
    for place, window in enumerate(windows):
        tokens[place, : len(window)] = window
    return models.prefill(config, params, jnp.asarray(tokens), jnp.asarray(lengths), length=length)


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
    prompt_indices: jax.Array,
    step: int,
) -> tuple[jax.Array, tuple[jax.Array, DecodeCache, jax.Array]]:
    """Choose a token below `vocab_size` for each row and feed it to the model.

    Returns:
      The tokens [B] int32, and the next logits [B, V], cache and seen tokens [B, V].
    """

    def key_of(index: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, index), step)

    keys = jax.vmap(key_of)(prompt_indices)
    known = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
    chosen = sample(known, seen, keys, sampling)
    seen = seen.at[jnp.arange(seen.shape[0]), chosen].set(True)
    logits, cache = models.step(config, params, chosen, cache)
    return chosen, (logits, cache, seen)
