"""`bench parallel`: a block with a branch on each of two devices, and with both on one."""

import dataclasses
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowhn_jax import models
from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.config import Config, FlowHNConfig, MeshConfig, require_flowhn
from flowhn_jax.parallel.mesh import make_mesh, replicated
from flowhn_jax.report.table import markdown
from flowhn_jax.split import measured
from flowhn_jax.split.plan import with_fixed_share
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.timing import time_repeats
from kernels import backends

Run = Callable[[], Any]


def bench_parallel(config: Config, *, repeats: int, out: str) -> list[dict[str, Any]]:
    """Time forward and backward of one block at batch 1, alternating both ways; print the ratio.

    For each balance of the tokens: equal, FLOPs and, if `bench branches` has measured this device,
    time. On a CPU a device is one core: one device is bound to the first of the process's cores and
    two devices to the first two, whatever threads XLA has.

    Args:
      config: the model and its kernels' backends.
      repeats: timed calls of each; the median counts.
      out: path of the JSON file.

    Returns:
      A row for each balance.

    Raises:
      ValueError: `out` cannot be written, there are not two devices, the model does not have two
        branches, or the strategy does not split tokens.
    """
    whole = require_flowhn(config.model, "bench parallel")
    devices = jax.devices()
    if len(devices) < 2:
        raise ValueError(
            "bench parallel needs two devices; found 1. On a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2."
        )
    if not whole.split.strategy_class.is_split:
        raise ValueError(
            "model.split.strategy must be one that splits tokens for bench parallel, e.g. "
            f"'fac_split'; got {whole.split.strategy!r}."
        )
    check_out(out)
    balances = ["equal", "flops"]
    if whole.split.reads == "own" and measured.load(devices[0].device_kind, whole.dims):
        balances.append("time")
    cores = _cores(devices[0].platform)
    print(f"{devices[0].device_kind}, batch 1, context {config.model.context:,}\n")
    rows = []
    with progress(len(balances) * repeats, "timing blocks", "pairs of calls") as bar:
        for balance in balances:
            model = _one_block(whole, balance)
            with backends.use(config.kernels.backend):
                one, of_one = _block(model, 1)
                two, of_two = _block(model, 2)
            seconds: list[list[float]] = [[], []]
            for _ in range(repeats):
                for i, run in enumerate((one, two)):
                    _bind_threads(cores[: i + 1])
                    seconds[i] += time_repeats(run, 1)
                bar.update()
            _bind_threads(cores)
            medians = [statistics.median(each) for each in seconds]
            rows.append(
                {
                    "balance": balance,
                    "attention_tokens": model.plan().blocks[0].attention.count(model.context),
                    "one_device_seconds": medians[0],
                    "two_devices_seconds": medians[1],
                    "ratio": medians[0] / medians[1],
                    "largest_difference": _largest_difference(of_one, of_two),
                }
            )
    print(_table(rows))
    write_results(out, {"rows": rows})
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    headings = ["balance", "attention's tokens", "one device ms", "two devices ms", "ratio"]
    table = [
        [
            row["balance"],
            f"{row['attention_tokens']:,}",
            f"{1e3 * row['one_device_seconds']:.1f}",
            f"{1e3 * row['two_devices_seconds']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return markdown(headings, table)


def _one_block(model: FlowHNConfig, balance: str) -> FlowHNConfig:
    split = dataclasses.replace(model.split, balance=balance, stem=0, stem_kind="no_split")
    split = with_fixed_share(split, model.dims, model.context)
    return dataclasses.replace(model, blocks=1, vocab_size=1, split=split)


def _block(model: FlowHNConfig, branch: int) -> tuple[Run, Any]:
    """Return forward and backward of a block on a mesh of `branch` devices, and its results."""
    mesh = make_mesh(MeshConfig(data=1, branch=branch), 1)
    with jax.set_mesh(mesh):
        graph, params = nnx.split(models.build(model).blocks[0])
        plan = model.plan().blocks[0]
        shape = 1, model.context, model.width
        keys = jax.random.split(jax.random.key(0))
        x, dy = (jax.random.normal(key, shape, models.compute_dtype(model)) for key in keys)
        segment_ids = jnp.ones(shape[:2], jnp.int32)
        arguments = jax.device_put((params, x, dy), replicated(mesh))

        def run(params: Any, x: jax.Array, dy: jax.Array) -> Any:
            def forward(params: Any, x: jax.Array) -> jax.Array:
                return nnx.merge(graph, params)(x, segment_ids, plan=plan)

            y, vjp = jax.vjp(forward, params, x)
            return y, vjp(dy)

        compiled = jax.jit(run).lower(*arguments).compile()
    return lambda: compiled(*arguments), jax.device_get(compiled(*arguments))


def _largest_difference(found: Any, expected: Any) -> float:
    """Return the largest difference of two trees, relative to each array's largest magnitude."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(np.float32(a) - np.float32(b))) / np.max(np.abs(np.float32(b))))
        for a, b in pairs
    )


def _cores(platform: str) -> list[int]:
    """Return the cores of this process on a CPU, none on other platforms."""
    return sorted(os.sched_getaffinity(0)) if platform == "cpu" else []


def _bind_threads(cores: list[int]) -> None:
    """Bind all threads of this process to `cores`, if there are any."""
    if cores:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
