"""`bench checkpoint`: how much longer steps take while a checkpoint is written behind them."""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.training.health.monitor import Progress
from flowhn_jax.training.step import abstract_batch, make_train_step
from kernels import backends

_STEPS = 100  # from one checkpoint to the next


def bench_checkpoint(config: Config, *, repeats: int, out: str) -> dict[str, Any]:
    """Times segments of 100 steps with and without a save at their beginning, in turns.

    A segment ends when its last step and its checkpoint are done, so that what is written in the
    background counts wherever it delays the steps or outlasts them. Text is this package's own
    sources. Checkpoints are written beside `out`, on whose disk their cost depends.

    Args:
      config: the recipe, whose context, batch size and `keep_checkpoints` count.
      repeats: timed pairs of segments, of which the median counts.
      out: path of the JSON file.
    """
    mesh = make_mesh(config.mesh, config.train.batch_size)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    in_save: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=pathlib.Path(out).absolute().parent) as folder,
        jax.set_mesh(mesh),
        backends.use(config.kernels.backend),
        Checkpoints(folder, config) as checkpoints,
    ):
        prepared = open_data(config, folder)
        size = config.train.batch_size
        batches = train_batches(prepared, batch_size=size, seed=config.data.seed)
        state = init_state(config, mesh)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step = make_train_step(config, mesh).lower(state, abstract_batch(config, mesh)).compile()
        for turn in range(repeats + 1):
            for saves in seconds:
                start = saved = time.perf_counter()
                if saves and checkpoints.fits(state):
                    checkpoints.save(state, batches, dataclasses.asdict(Progress()))
                    saved = time.perf_counter()
                for _ in range(_STEPS):
                    state, metrics = step(state, shard_batch(next(batches), mesh))
                    jax.device_get(metrics)
                checkpoints.wait()
                if turn:  # the first one warms up
                    seconds[saves].append(time.perf_counter() - start)
                    in_save += [saved - start] if saves else []
        batches.close()
    ratios = [both / alone for alone, both in zip(*seconds.values(), strict=True)]
    without, with_save = (statistics.median(each) for each in seconds.values())
    row = {
        "model": config.model.name,
        "steps": _STEPS,
        "state_bytes": state_bytes,
        "seconds_without": without,
        "seconds_with": with_save,
        "seconds_in_save": statistics.median(in_save),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(
        f"{config.model.name}, {state_bytes / 2**20:,.1f} MiB of state: {_STEPS} steps take "
        f"{without:.3f} s, and {with_save:.3f} s with a checkpoint, of which they wait "
        f"{1e3 * row['seconds_in_save']:.0f} ms for its beginning\n"
        f"ratio {row['ratio']:.4f}, least {min(ratios):.4f}, most {max(ratios):.4f}"
    )
    with open(out, "w") as file:
        json.dump(row, file)
    print(f"wrote {out}")
    return row
