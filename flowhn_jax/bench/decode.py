"""`bench decode`: what a decode step takes early and late in a context, and what caches save."""

import json
import statistics
import time
from functools import partial
from typing import Any

import jax
import numpy as np

from flowhn_jax import models
from flowhn_jax.config import Config, ModelConfig
from flowhn_jax.evaluation.generate import bucket
from flowhn_jax.models import DecodeCache, Params
from kernels import backends

Row = dict[str, Any]

_EARLY, _STEPS, _NEW_TOKENS = 10, 16, 256


def bench_decode(config: Config, *, repeats: int, out: str) -> Row:
    """Times steps of one sequence around two positions in turns, and greedy decoding both ways.

    Decoding without a cache runs one forward pass a token, each over the tokens so far, padded to
    the next power of two. Parameters and prompts are random.

    Args:
      config: the recipe of the model, with a context of 512 or more.
      repeats: runs of 16 steps at each position, of which the median counts.
      out: path of the JSON file.

    Raises:
      ValueError: the context is too short, or the model has no caches.
    """
    model = config.model
    if model.context < 2 * _NEW_TOKENS:
        raise ValueError(
            f"model.context is {model.context}; accepted is {2 * _NEW_TOKENS} or more, to tell "
            "early positions from late ones."
        )
    if not models.can_decode(model):
        raise ValueError(f"split.scope is {model.split.scope!r}; accepted is 'context'.")
    late = min(1000, model.context - _STEPS)
    with backends.use(config.kernels.backend):
        params = models.for_inference(model, models.init(model, jax.random.key(0)))
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, late), np.int32)
        at = {position: tokens[:, :position] for position in (_EARLY, late)}
        seconds: dict[int, list[float]] = {position: [] for position in at}
        for turn in range(repeats + 1):
            for position, prompt in at.items():
                each = _seconds_a_step(model, params, prompt)
                if turn:  # the first one compiles
                    seconds[position].append(each)
        prompt = tokens[:, :_EARLY]
        for run in (_with_cache, _recomputing):
            run(model, params, prompt, 2 if run is _with_cache else _NEW_TOKENS)  # compiles
        cached, recomputed = (
            run(model, params, prompt, _NEW_TOKENS) for run in (_with_cache, _recomputing)
        )
    early_ms, late_ms = (1e3 * statistics.median(seconds[position]) for position in at)
    row = {
        "model": model.name,
        "context": model.context,
        "early_position": _EARLY,
        "late_position": late,
        "early_ms": early_ms,
        "late_ms": late_ms,
        "late_over_early": late_ms / early_ms,
        "cached_seconds": cached[0],
        "recomputed_seconds": recomputed[0],
        "speedup": recomputed[0] / cached[0],
        "same_tokens": cached[1] == recomputed[1],
        "new_tokens": _NEW_TOKENS,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(
        f"{model.name}, context {model.context:,}: a step takes {early_ms:.3f} ms at position "
        f"{_EARLY} and {late_ms:.3f} ms at {late:,}, {late_ms / early_ms:.2f} times as long\n"
        f"{_NEW_TOKENS} greedy tokens: {cached[0]:.2f} s with caches, {recomputed[0]:.2f} s by "
        f"forward passes, {recomputed[0] / cached[0]:.1f} times as long; "
        f"{'the same tokens' if row['same_tokens'] else 'other tokens'}"
    )
    with open(out, "w") as file:
        json.dump(row, file)
    print(f"wrote {out}")
    return row


def _seconds_a_step(model: ModelConfig, params: Params, prompt: np.ndarray) -> float:
    """Mean over a few steps behind the prompt, which take both branches' tokens."""
    _, cache = models.prefill(model, params, prompt, length=model.context)
    jax.block_until_ready(cache)
    start = time.perf_counter()
    for _ in range(_STEPS):
        logits, cache = models.step(model, params, prompt[:, 0], cache)
        logits.block_until_ready()
    return (time.perf_counter() - start) / _STEPS


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _next(
    model: ModelConfig, params: Params, logits: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, jax.Array, DecodeCache]:
    """The likeliest token, and logits and cache behind it."""
    chosen = logits.argmax(-1)
    return chosen, *models.step(model, params, chosen, cache)


@partial(jax.jit, static_argnums=0)
def _next_of_all(model: ModelConfig, params: Params, tokens: jax.Array, last: int) -> jax.Array:
    """The likeliest token behind position `last`."""
    return models.forward(model, params, tokens)[0, last].argmax()


def _with_cache(
    model: ModelConfig, params: Params, prompt: np.ndarray, count: int
) -> tuple[float, list[int]]:
    start, found = time.perf_counter(), []
    logits, cache = models.prefill(model, params, prompt, length=model.context)
    for _ in range(count):
        chosen, logits, cache = _next(model, params, logits, cache)
        found.append(int(np.asarray(chosen)[0]))
    return time.perf_counter() - start, found


def _recomputing(
    model: ModelConfig, params: Params, prompt: np.ndarray, count: int
) -> tuple[float, list[int]]:
    start, window = time.perf_counter(), prompt[0].tolist()
    for _ in range(count):
        padded = np.pad(window, (0, bucket(len(window)) - len(window)))[None]
        window.append(int(_next_of_all(model, params, padded, len(window) - 1)))
    return time.perf_counter() - start, window[prompt.shape[1] :]
