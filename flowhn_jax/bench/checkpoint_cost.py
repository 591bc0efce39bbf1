"""`bench checkpoint`: how much saving in the background slows training down."""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import make_init
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.report.table import markdown
from flowhn_jax.training.health.monitor import Progress
from flowhn_jax.training.step import abstract_batch, make_train_step
from flowhn_jax.utils.progress import progress
from kernels import backends

_STEPS = 100  # from one checkpoint to the next


def bench_checkpoint(config: Config, *, repeats: int, out: str) -> dict[str, Any]:
    """Time segments of 100 steps, alternately with and without a save at their start.

    A segment ends when both its last step and its checkpoint are complete, so the background write
    counts whether it delays the steps or outlasts them. The text is the recipe's. Checkpoints are
    written to the folder of `out`, because their cost depends on the disk.

    Args:
      config: the recipe; its context, batch size and `keep_checkpoints` matter.
      repeats: timed pairs of segments; the median counts.
      out: path of the JSON file.

    Returns:
      The results as written to `out`.

    Raises:
      ValueError: `out` cannot be written.
    """
    check_out(out)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    in_save: list[float] = []
    with (
        tempfile.TemporaryDirectory(dir=pathlib.Path(out).absolute().parent) as folder,
        jax.set_mesh(mesh),
        backends.use(config.kernels.backend),
        Checkpoints(folder, config) as checkpoints,
        progress(2 * (repeats + 1), "timing checkpoints", "segments") as bar,
    ):
        prepared = open_data(config, folder)
        size = config.train.batch_size
        batches = train_batches(prepared, batch_size=size, seed=config.data.seed)
        state = make_init(config, mesh)(jax.random.key(config.train.seed))
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step = make_train_step(config, mesh).lower(state, abstract_batch(config, mesh)).compile()
        for repeat in range(repeats + 1):
            for saves in seconds:
                start = saved = time.perf_counter()
                if saves and checkpoints.fits(state):
                    checkpoints.save(state, batches, dataclasses.asdict(Progress()))
                    saved = time.perf_counter()
                for _ in range(_STEPS):
                    state, metrics = step(state, shard_batch(next(batches), mesh))
                    jax.device_get(metrics)
                checkpoints.wait()
                if repeat:  # the first pair warms up
                    seconds[saves].append(time.perf_counter() - start)
                    in_save += [saved - start] if saves else []
                bar.update()
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
    }
    figures = [
        ["state, MiB", f"{state_bytes / 2**20:,.1f}"],
        [f"{_STEPS} steps, s", f"{without:.3f}"],
        [f"{_STEPS} steps and a checkpoint, s", f"{with_save:.3f}"],
        ["steps wait for it to begin, ms", f"{1e3 * row['seconds_in_save']:.0f}"],
        ["ratio, median", f"{row['ratio']:.4f}"],
        ["ratio, min", f"{row['ratio_min']:.4f}"],
        ["ratio, max", f"{row['ratio_max']:.4f}"],
    ]
    print(markdown([config.model.name, ""], figures))
    return write_results(out, row)
