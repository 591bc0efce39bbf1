"""`bench decode`: time of a decode step early and late in a context, and what caches save."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax import models
from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.config import Config, ModelConfig
from flowhn_jax.evaluation.generate import bucket
from flowhn_jax.models import DecodeCache, Params
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.progress import activity, progress
from kernels import backends

Row = dict[str, Any]
Decode = Callable[[ModelConfig, Params, jax.Array, int], tuple[float, list[int]]]

_EARLY, _STEPS, _NEW_TOKENS = 10, 16, 256


def bench_decode(config: Config, *, repeats: int, out: str) -> Row:
    """Time steps of one sequence at two positions, alternately, and both ways of greedy decoding.

    Decoding without a cache runs one forward pass per token over all earlier tokens, padded to the
    next power of two. Parameters and prompts are random.

    Args:
      config: the recipe of the model, with a context of 512 or more.
      repeats: runs of 16 steps at each position; the median counts.
      out: path of the JSON file.

    Returns:
      The results as written to `out`.

    Raises:
      ValueError: `out` cannot be written, the context is too short, or the model has no caches.
    """
    model = config.model
    if model.context < 2 * _NEW_TOKENS:
        raise ValueError(
            f"model.context must be at least {2 * _NEW_TOKENS} for bench decode, so that early "
            f"positions differ from late ones; got {model.context}."
        )
    if not models.can_decode(model):
        raise ValueError("model.split.scope must be 'context' for bench decode; got 'sequence'.")
    check_out(out)
    late = min(1000, model.context - _STEPS)
    with backends.use(config.kernels.backend):
        params = models.for_inference(model, models.init(model, jax.random.key(0)))
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, late), np.int32)
        prompts = {position: jnp.asarray(tokens[:, :position]) for position in (_EARLY, late)}
        seconds: dict[int, list[float]] = {position: [] for position in prompts}
        for repeat in progress(range(repeats + 1), "timing decode steps", "repeats"):
            for position, prompt in prompts.items():
                found = _seconds_per_step(model, params, prompt)
                if repeat:  # the first repeat compiles
                    seconds[position].append(found)
        with activity("decoding with caches and by forward passes"):
            cached = _decode(_with_cache, model, params, prompts[_EARLY], compiles=2)
            recomputed = _decode(_recomputing, model, params, prompts[_EARLY], compiles=_NEW_TOKENS)
    early_ms, late_ms = (1e3 * statistics.median(seconds[position]) for position in prompts)
    row: Row = {
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
    }
    late_ratio, speedup = f"{row['late_over_early']:.2f}", f"{row['speedup']:.1f}"
    figures = [
        [f"step at position {_EARLY}", f"{early_ms:.3f} ms", ""],
        [f"step at position {late:,}", f"{late_ms:.3f} ms", f"{late_ratio} times as long"],
        [f"{_NEW_TOKENS} greedy tokens with caches", f"{cached[0]:.2f} s", ""],
        ["by forward passes", f"{recomputed[0]:.2f} s", f"{speedup} times as long"],
    ]
    print(markdown([f"{model.name}, context {model.context:,}", "time", "ratio"], figures))
    same = "the same tokens" if row["same_tokens"] else "different tokens"
    print(f"Both ways of decoding give {same}.")
    return write_results(out, row)


def _seconds_per_step(model: ModelConfig, params: Params, prompt: jax.Array) -> float:
    """Return the mean over the steps after a prompt; they take tokens of both branches."""
    _, cache = models.prefill(model, params, prompt, length=model.context)
    token = prompt[:, 0]
    jax.block_until_ready((token, cache))
    start = time.perf_counter()
    for _ in range(_STEPS):
        logits, cache = models.step(model, params, token, cache)
        logits.block_until_ready()
    return (time.perf_counter() - start) / _STEPS


def _decode(
    decode: Decode, model: ModelConfig, params: Params, prompt: jax.Array, compiles: int
) -> tuple[float, list[int]]:
    """Return seconds and tokens of decoding `_NEW_TOKENS`, after `compiles` tokens to warm up."""
    decode(model, params, prompt, compiles)
    return decode(model, params, prompt, _NEW_TOKENS)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _next(
    model: ModelConfig, params: Params, logits: jax.Array, cache: DecodeCache
) -> tuple[jax.Array, jax.Array, DecodeCache]:
    """Return the most likely token, and the logits and the cache that result from it."""
    chosen = logits.argmax(-1)
    return chosen, *models.step(model, params, chosen, cache)


@partial(jax.jit, static_argnums=0)
def _next_of_all(model: ModelConfig, params: Params, tokens: jax.Array, last: int) -> jax.Array:
    """Return the most likely token after position `last`."""
    return models.forward(model, params, tokens)[0, last].argmax()


def _with_cache(
    model: ModelConfig, params: Params, prompt: jax.Array, count: int
) -> tuple[float, list[int]]:
    start, found = time.perf_counter(), []
    logits, cache = models.prefill(model, params, prompt, length=model.context)
    for _ in range(count):
        chosen, logits, cache = _next(model, params, logits, cache)
        found.append(int(np.asarray(chosen)[0]))
    return time.perf_counter() - start, found


def _recomputing(
    model: ModelConfig, params: Params, prompt: jax.Array, count: int
) -> tuple[float, list[int]]:
    start, window = time.perf_counter(), np.asarray(prompt)[0].tolist()
    for _ in range(count):
        padded = np.pad(window, (0, bucket(len(window)) - len(window)))[None]
        window.append(int(_next_of_all(model, params, jnp.asarray(padded), len(window) - 1)))
    return time.perf_counter() - start, window[prompt.shape[1] :]
