"""`bench branches`: both branches of a model over numbers of tokens, for split.balance='time'."""

import dataclasses
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flowhn_jax import models
from flowhn_jax.config import Config, ModelConfig
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.split import SplitConfig, attention_branch_flops, measured, ssm_branch_flops
from flowhn_jax.split.plan import attention_tokens
from flowhn_jax.utils.timing import time_repeats
from kernels import backends

_POINTS = 8  # token counts, equally far apart up to the context


def bench_branches(config: Config, *, repeats: int, out: str) -> measured.BranchTimes:
    """Times forward and backward of both branches, fits and keeps the costs, and prints them.

    One device runs its part of a batch: train.batch_size / train.accumulate sequences over the
    devices there are.

    Args:
      config: the model, its batch and its kernels' backends.
      repeats: timed calls at each number of tokens, of which the median counts.
      out: path of the JSON file.

    Raises:
      ValueError: the model has no such branches.
    """
    model = config.model
    check_has_branches("bench branches", model)
    batch = max(1, config.train.batch_size // config.train.accumulate // jax.device_count())
    kind = backends.target_device_kind()
    tokens = [max(1, model.context * i // _POINTS) for i in range(1, _POINTS + 1)]
    print(f"{kind}, batch {batch}, {models.compute_dtype(model)}, median of {repeats}\n")
    print(f"{'tokens':>8} {'attention ms':>13} {'SSM ms':>9}")
    rows = []
    with backends.use(config.kernels.backend), backends.record() as chosen:
        one_block = dataclasses.replace(model, blocks=1, vocab_size=1, split=SplitConfig())
        block = models.build(one_block).blocks[0]
        for n in tokens:
            seconds = {
                name: _seconds(model, branch, batch, n, repeats)
                for name, branch in (("attention", block.attention), ("ssm", block.ssm))
            }
            rows.append({"tokens": n, **seconds})
            print(f"{n:>8,} {1e3 * seconds['attention']:>13.3f} {1e3 * seconds['ssm']:>9.3f}")
    times = measured.fit(tokens, *([row[name] for row in rows] for name in ("attention", "ssm")))
    measured.save(kind, model.dims, times)
    _report(model, times)
    document = {
        "device": kind,
        "jax": jax.__version__,
        "kernels": backends.describe(chosen),
        "batch": batch,
        "rows": rows,
        **dataclasses.asdict(times),
    }
    with open(out, "w") as file:
        json.dump(document, file, indent=1)
    print(f"wrote {out}")
    return times


def check_has_branches(command: str, model: ModelConfig) -> None:
    """Raise ValueError where a command that measures both branches gets a model without them."""
    if model.kind != "flowhn":
        raise ValueError(
            f"{command} needs a model of two branches, model.kind 'flowhn'; got {model.kind!r}."
        )


def _seconds(
    model: ModelConfig, branch: DecoderLayer, batch: int, tokens: int, repeats: int
) -> float:
    """Median time of forward and backward on [batch, tokens, width].

    With segment ids, of one document, as in training: they may make another kernel run.
    """
    graph, params = nnx.split(branch)
    shape, dtype = (batch, tokens, model.width), models.compute_dtype(model)
    x, dy = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0)))
    segment_ids = jnp.ones((batch, tokens), jnp.int32)

    @jax.jit
    def run(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params)(x, segment_ids)

        y, vjp = jax.vjp(forward, params, x)
        return y, vjp(dy)

    return statistics.median(time_repeats(lambda: run(params, x, dy), repeats))


def _report(model: ModelConfig, times: measured.BranchTimes) -> None:
    context, dims = model.context, model.dims
    print()
    for balance in ("equal", "flops", "time"):
        if balance == "time":
            a = times.balanced_tokens(context)
        else:
            split = dataclasses.replace(model.split, balance=balance)
            a = attention_tokens(split, dims, context)
        attention, ssm = times.attention_seconds(a), times.ssm_seconds(context - a)
        flops = attention_branch_flops(dims, a) / ssm_branch_flops(dims, context - a)
        print(
            f"balance {balance:>5}: attention {a:,} of {context:,} tokens, {1e3 * attention:.3f} "
            f"and {1e3 * ssm:.3f} ms, FLOPs {flops:.2f} : 1"
        )
