"""`bench branches`: time of each branch by its tokens, for model.split.balance='time'."""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowhn_jax import models
from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.config import Config, FlowHNConfig, ModelConfig, require_flowhn
from flowhn_jax.layers.decoder import DecoderLayer
from flowhn_jax.report.table import markdown
from flowhn_jax.split import SplitConfig, attention_branch_flops, measured, ssm_branch_flops
from flowhn_jax.split.plan import attention_tokens
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.timing import time_repeats
from kernels import backends

_POINTS = 8  # token counts, evenly spaced up to the context


def bench_branches(config: Config, *, repeats: int, out: str) -> measured.BranchTimes:
    """Time both branches, fit their costs, cache the fit for this device, and print it.

    Forward and backward are timed on one device with its share of a batch: train.batch_size /
    train.accumulate sequences, divided by the number of devices.

    Args:
      config: the model, its batch and its kernels' backends.
      repeats: timed calls at each number of tokens; the median counts.
      out: path of the JSON file.

    Returns:
      The fitted times.

    Raises:
      ValueError: `out` cannot be written, or the model does not have two branches.
    """
    model = require_flowhn(config.model, "bench branches")
    if model.split.reads != "own":
        raise ValueError(
            "model.split.reads must be 'own' for bench branches, which times branches that read "
            f"their own tokens; got {model.split.reads!r}."
        )
    check_out(out)
    batch = max(1, config.train.batch_size // config.train.accumulate // jax.device_count())
    kind = backends.target_device_kind()
    tokens = [max(1, model.context * i // _POINTS) for i in range(1, _POINTS + 1)]
    print(f"{kind}, batch {batch}, {models.compute_dtype(model)}, median of {repeats}\n")
    rows = []
    with backends.use(config.kernels.backend), backends.record() as chosen:
        one_block = dataclasses.replace(model, blocks=1, vocab_size=1, split=SplitConfig())
        block: Any = models.build(one_block).blocks[0]
        for n in progress(tokens, "timing the branches", "token counts"):
            seconds = {
                name: _seconds(model, branch, batch, n, repeats)
                for name, branch in (("attention", block.attention), ("ssm", block.ssm))
            }
            rows.append({"tokens": n, **seconds})
    print(
        markdown(
            ["tokens", "attention ms", "SSM ms"],
            [
                [f"{row['tokens']:,}", *(f"{1e3 * row[name]:.3f}" for name in ("attention", "ssm"))]
                for row in rows
            ],
        )
    )
    times = measured.fit(tokens, *([row[name] for row in rows] for name in ("attention", "ssm")))
    measured.save(kind, model.dims, times)
    print(f"\n{_balances(model, times)}")
    results = {"device": kind, "kernels": backends.describe(chosen), "batch": batch, "rows": rows}
    write_results(out, results | dataclasses.asdict(times))
    return times


def _seconds(
    model: ModelConfig, branch: DecoderLayer, batch: int, tokens: int, repeats: int
) -> float:
    """Return the median time of forward and backward on [batch, tokens, width].

    As in training there are segment ids, here of one document: they may select another kernel.
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


def _balances(model: FlowHNConfig, times: measured.BranchTimes) -> str:
    """Return attention's tokens, both branches' times and their FLOPs for each balance."""
    context, dims = model.context, model.dims
    table = []
    for balance in ("equal", "flops", "time"):
        if balance == "time":
            a = times.balanced_tokens(context)
        else:
            split = dataclasses.replace(model.split, balance=balance)
            a = attention_tokens(split, dims, context)
        attention = times.attention_seconds(np.asarray(a))
        ssm = times.ssm_seconds(np.asarray(context - a))
        flops = attention_branch_flops(dims, a) / ssm_branch_flops(dims, context - a)
        table.append(
            [
                balance,
                f"{a:,} of {context:,}",
                f"{1e3 * attention:.3f}",
                f"{1e3 * ssm:.3f}",
                f"{flops:.2f}",
            ]
        )
    headings = ["balance", "attention's tokens", "attention ms", "SSM ms", "FLOPs ratio"]
    return markdown(headings, table)
