"""`bench parallel`: a block on two groups of devices, a branch each, and on one with both."""

import dataclasses
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowhn_jax import models
from flowhn_jax.bench.branches import check_has_branches
from flowhn_jax.config import Config, MeshConfig, ModelConfig
from flowhn_jax.parallel.mesh import make_mesh, replicated
from flowhn_jax.split import measured
from flowhn_jax.split.plan import with_fixed_share
from flowhn_jax.utils.timing import time_repeats
from kernels import backends

Run = Callable[[], Any]


def bench_parallel(config: Config, *, repeats: int, out: str) -> list[dict[str, Any]]:
    """Times forward and backward of one block at batch 1, both ways in turn, and prints the ratio.

    By each balance of the tokens: equal, FLOPs and, where `bench branches` has measured this
    device, time. On a CPU a device is one core: the one device keeps to the first of the process's
    cores and the two to the first two, whatever threads XLA has.

    Args:
      config: the model and its kernels' backends.
      repeats: timed calls of each, of which the median counts.
      out: path of the JSON file.

    Raises:
      ValueError: there are not two devices, the model does not have two branches, or the strategy
        does not split tokens.
    """
    check_has_branches("bench parallel", config.model)
    devices = jax.devices()
    if len(devices) < 2:
        raise ValueError(
            "bench parallel needs two devices, but there is one; on a CPU set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2."
        )
    if not config.model.split.strategy_class.is_split:
        found = config.model.split.strategy
        raise ValueError(f"bench parallel takes a strategy that splits tokens; found {found!r}.")
    balances = ["equal", "flops"]
    if measured.load(devices[0].device_kind, config.model.dims):
        balances.append("time")
    cores = _cores(devices[0].platform)
    print(f"{devices[0].device_kind}, batch 1, context {config.model.context:,}\n")
    print(f"{'balance':>8} {'attention':>10} {'one device ms':>14} {'two ms':>9} {'ratio':>6}")
    rows = []
    for balance in balances:
        model = _one_block(config.model, balance)
        with backends.use(config.kernels.backend):
            one, of_one = _block(model, 1)
            two, of_two = _block(model, 2)
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            for i, run in enumerate((one, two)):
                _keep_to(cores[: i + 1])
                seconds[i] += time_repeats(run, 1)
        _keep_to(cores)
        medians = [statistics.median(each) for each in seconds]
        row = {
            "balance": balance,
            "attention_tokens": model.plan().blocks[0].attention.count(model.context),
            "one_device_seconds": medians[0],
            "two_devices_seconds": medians[1],
            "ratio": medians[0] / medians[1],
            "largest_difference": _largest_difference(of_one, of_two),
        }
        rows.append(row)
        print(
            f"{balance:>8} {row['attention_tokens']:>10,} {1e3 * medians[0]:>14.1f} "
            f"{1e3 * medians[1]:>9.1f} {row['ratio']:>6.2f}",
            flush=True,
        )
    with open(out, "w") as file:
        json.dump({"device": devices[0].device_kind, "jax": jax.__version__, "rows": rows}, file)
    print(f"wrote {out}")
    return rows


def _one_block(model: ModelConfig, balance: str) -> ModelConfig:
    split = dataclasses.replace(model.split, balance=balance, stem=0)
    split = with_fixed_share(split, model.dims, model.context)
    return dataclasses.replace(model, blocks=1, vocab_size=1, split=split)


def _block(model: ModelConfig, branch: int) -> tuple[Run, Any]:
    """Forward and backward of a block on a mesh of so many devices, and what it gives."""
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
                return nnx.merge(graph, params)(x, plan, segment_ids)

            y, vjp = jax.vjp(forward, params, x)
            return y, vjp(dy)

        compiled = jax.jit(run).lower(*arguments).compile()
    return lambda: compiled(*arguments), jax.device_get(compiled(*arguments))


def _largest_difference(found: Any, expected: Any) -> float:
    """Of outputs and gradients, against the largest magnitude of each."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.max(np.abs(np.float32(a) - np.float32(b))) / np.max(np.abs(np.float32(b))))
        for a, b in pairs
    )


def _cores(platform: str) -> list[int]:
    return sorted(os.sched_getaffinity(0)) if platform == "cpu" else []


def _keep_to(cores: list[int]) -> None:
    """All threads of this process on these cores; nothing where there are none."""
    if cores:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
