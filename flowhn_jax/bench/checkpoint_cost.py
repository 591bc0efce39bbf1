"""`bench checkpoint`: how much saving in the background slows training down."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from typing import Any

import jax

from flowhn_jax.bench.output import check_out, write_results
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.report.table import markdown
from flowhn_jax.storage import is_remote, place, temporary_folder
from flowhn_jax.training.health.monitor import RunProgress
from flowhn_jax.training.step import abstract_batch, make_train_step
from flowhn_jax.utils.progress import progress
from kernels import backends

_STEPS = 100  # from one checkpoint to the next


def bench_checkpoint(config: Config, *, repeats: int, out: str) -> dict[str, Any]:
    """Time segments of 100 steps, alternately with and without a save at their start.

    A segment ends when both its last step and its checkpoint are complete, so the background write
    counts whether it delays the steps or outlasts them. The text is the recipe's. Checkpoints are
    written to the folder of `out`, because their cost depends on the disk. If that is in a bucket,
    segments with a save to a local folder are timed as well.

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
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(tempfile.TemporaryDirectory())
        homes = {"with": stack.enter_context(temporary_folder(place(out).absolute().parent))}
        if is_remote(out):
            homes["with_local"] = place(local) / "run"
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(backends.use(config.kernels.backend))
        stores: dict[str, Checkpoints | None] = {"without": None}
        for name, home in homes.items():
            stores[name] = stack.enter_context(Checkpoints(str(home), config))
        size = config.train.batch_size
        batches = train_batches(open_data(config, local), batch_size=size, seed=config.data.seed)
        stack.callback(batches.close)
        state = init_state(config, mesh)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step = make_train_step(config, mesh).lower(state, abstract_batch(config, mesh)).compile()
        seconds: dict[str, list[float]] = {name: [] for name in stores}
        in_save: dict[str, list[float]] = {name: [] for name in stores}
        bar = stack.enter_context(
            progress(len(stores) * (repeats + 1), "timing checkpoints", "segments")
        )
        for repeat in range(repeats + 1):
            for name, checkpoints in stores.items():
                start = saved = time.perf_counter()
                if checkpoints is not None and checkpoints.fits(state):
                    checkpoints.save(state, batches, dataclasses.asdict(RunProgress()))
                    saved = time.perf_counter()
                for _ in range(_STEPS):
                    state, metrics = step(state, shard_batch(next(batches), mesh))
                    jax.device_get(metrics)
                if checkpoints is not None:
                    checkpoints.wait()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
                    in_save[name].append(saved - start)
                bar.update()
    ratios = [both / alone for alone, both in zip(seconds["without"], seconds["with"], strict=True)]
    without, with_save = (statistics.median(seconds[name]) for name in ("without", "with"))
    row = {
        "model": config.model.name,
        "steps": _STEPS,
        "state_bytes": state_bytes,
        "seconds_without": without,
        "seconds_with": with_save,
        "seconds_in_save": statistics.median(in_save["with"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if "with_local" in seconds:
        pairs = zip(seconds["with_local"], seconds["with"], strict=True)
        row |= {
            "seconds_with_local": statistics.median(seconds["with_local"]),
            "seconds_in_save_local": statistics.median(in_save["with_local"]),
            "ratio_to_local": statistics.median([both / local for local, both in pairs]),
        }
    figures = [
        ["state, MiB", f"{state_bytes / 2**20:,.1f}"],
        [f"{_STEPS} steps, s", f"{without:.3f}"],
        [f"{_STEPS} steps and a checkpoint, s", f"{with_save:.3f}"],
        ["steps blocked while a save begins, ms", f"{1e3 * row['seconds_in_save']:.0f}"],
        ["ratio, median", f"{row['ratio']:.4f}"],
        ["ratio, min", f"{row['ratio_min']:.4f}"],
        ["ratio, max", f"{row['ratio_max']:.4f}"],
    ]
    if "with_local" in seconds:
        figures += [
            [f"{_STEPS} steps and a local checkpoint, s", f"{row['seconds_with_local']:.3f}"],
            [
                "steps blocked while a local save begins, ms",
                f"{1e3 * row['seconds_in_save_local']:.0f}",
            ],
            ["ratio to these, median", f"{row['ratio_to_local']:.4f}"],
        ]
    print(markdown([config.model.name, ""], figures))
    return write_results(out, row)
