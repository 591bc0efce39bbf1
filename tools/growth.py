"""Test whether memory, files or threads of a run grow: `python -m tools.growth --steps=2000`.

The run trains in this process, with validation, checkpoints, metrics and TensorBoard as usual.
"""

import argparse
import ctypes
import dataclasses
import gc
import itertools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.config import Config, DataConfig
from flowhn_jax.report.table import print_result
from flowhn_jax.training.trainer import fit
from flowhn_jax.utils import cpu
from tools.small_run import prepare_text

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAST_STEPS, _LEAST_EVERY = 100, 10
_WARM_UP = 5  # checkpoints before the measured steps
_PATIENCE, _POLL = 60.0, 0.05  # seconds
# TensorStore's thread pool has a fixed size, but starts a thread only when all others are busy.
_STARTED_LATE = "ts_pool_worker"
_LIMIT = 0.01  # largest acceptable growth, as a share of the memory


@dataclasses.dataclass(frozen=True)
class Sample:
    """Resources of the process at one moment."""

    memory: int  # resident, bytes
    files: int  # open
    threads: int  # of the operating system, XLA's included

    @classmethod
    def now(cls) -> "Sample":
        """Return the current sample, after returning freed memory to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        names = [
            path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")
        ]
        return cls(resident * _PAGE, files, sum(name != _STARTED_LATE for name in names))


def measure_growth(workdir: str | os.PathLike, config: Config, steps: int) -> dict[str, Any]:
    """Train on this package's own sources and return how memory, files and threads changed.

    Validations and checkpoints come every `steps` / 20 steps, but at least 10 steps apart, and rows
    10 times as often; for 2000 steps these are the defaults. A sample is taken before each
    checkpoint, once the previous one is on the disk. Five checkpoints before the measured steps
    are warm-up.

    Args:
      workdir: an empty folder.
      config: the run's config; its data and step counts are replaced.
      steps: measured steps.

    Returns:
      The number of steps and samples, the median memory, its growth over the measured steps as a
      share of it (from a line fitted to all samples), and open files and threads before and after.

    Raises:
      ValueError: `steps` is too small.
    """
    if steps < _LEAST_STEPS:
        raise ValueError(f"--steps must be at least {_LEAST_STEPS}; got {steps}.")
    every = max(_LEAST_EVERY, steps // 20)
    cadence = {"log_every": every // 10, "eval_every": every, "checkpoint_every": every}
    workdir = pathlib.Path(workdir)
    total = _WARM_UP * every + steps
    config = dataclasses.replace(
        config,
        data=DataConfig(path=str(prepare_text(workdir, config.model.context))),
        train=dataclasses.replace(config.train, steps=total, **cadence),
    )
    samples: list[Sample] = []
    step = 0

    def sample() -> None:
        nonlocal step
        step += 1
        if step % every == 0:
            _wait_for_checkpoints(workdir / "run")
            samples.append(Sample.now())

    fit(config, str(workdir / "run"), sample)
    measured = samples[_WARM_UP:]
    memory = [sample.memory for sample in measured]
    # Memory fluctuates by some pages, so a line is fitted to all samples (Theil-Sen: the median of
    # the slopes between all pairs).
    slope = statistics.median(
        (b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(enumerate(memory), 2)
    )
    typical = statistics.median(memory)
    return {
        "steps": steps,
        "warm_up": step - steps,
        "samples": len(measured),
        "memory_mib": typical / 2**20,
        "memory_growth": slope * (steps / every) / typical,
        **{
            f"{name}_{when}": getattr(sample, name)
            for name in ("files", "threads")
            for when, sample in (("before", measured[0]), ("after", measured[-1]))
        },
    }


def _wait_for_checkpoints(workdir: pathlib.Path) -> None:
    """Wait until no checkpoint is being written any more, and its thread has ended."""
    folder = workdir / "checkpoints"
    end = time.monotonic() + _PATIENCE
    while any(not (path / "manifest.json").is_file() for path in folder.glob("*")):
        if time.monotonic() > end:
            raise ValueError(f"a checkpoint in {folder} was not finished within {_PATIENCE:g} s.")
        time.sleep(_POLL)
    time.sleep(_POLL)


def failures(growth: dict[str, Any]) -> list[str]:
    """Return the names of resources that grew; memory counts as grown from 1 % on."""
    found = [name for name in ("files", "threads") if _grew(growth, name)]
    return (["memory"] if growth["memory_growth"] >= _LIMIT else []) + found


def _grew(growth: dict[str, Any], name: str) -> bool:
    return growth[f"{name}_after"] > growth[f"{name}_before"]


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit with status 1 if a resource grew."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.growth",
        description="Train configs/flowhn_tiny.py and test if memory, open files or threads grow.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=2000,
        help="measured steps, after a warm-up (default %(default)s)",
    )
    options = parser.parse_args(argv)
    cpu.prepare_memory()  # like train.py
    try:
        with tempfile.TemporaryDirectory() as workdir:
            config = config_lib.parse(recipes.load("flowhn_tiny"))
            growth = measure_growth(workdir, config, options.steps)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_result(growth)
    if grown := failures(growth):
        sys.exit(f"these grew: {', '.join(grown)}")


if __name__ == "__main__":
    main()
