"""Whether a run grows as it trains: `python -m tools.growth --steps=2000`.

Validation, checkpoints, metrics and TensorBoard go on as in any run, in this process.
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
from flowhn_jax.utils.memory import keep_freed_memory
from tools.small_run import prepare_text

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAST_STEPS, _LEAST_EVERY = 100, 10
_WARM_UP = 5  # checkpoints before the measured steps
_PATIENCE, _SETTLING = 60.0, 0.05  # seconds
# TensorStore's pool, of a fixed size, starts a thread when all before it happen to be at work.
_STARTED_LATE = "ts_pool_worker"
_LIMIT = 0.01  # share of the memory


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the process holds at one moment."""

    memory: int  # resident, bytes
    files: int  # open
    threads: int  # the system's, XLA's among them

    @classmethod
    def now(cls) -> "Sample":
        """That of this moment; memory that is free already is given back before."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        names = [
            path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")
        ]
        return cls(resident * _PAGE, files, sum(name != _STARTED_LATE for name in names))


def measure_growth(workdir: str | os.PathLike, config: Config, steps: int) -> dict[str, Any]:
    """Trains in the empty folder, on this package's own sources; measures memory, files, threads.

    Validation and a checkpoint come twenty times (of 2000 steps as often as by the recipe), but
    every tenth step at the most, and rows ten times as often. A sample is taken before each
    checkpoint, when the one before is on the disk. Five of them warm up, in steps of their own. The
    growth of memory over the others is by a straight line through them.

    Raises:
      ValueError: `steps` are too few.
    """
    if steps < _LEAST_STEPS:
        raise ValueError(f"--steps is {steps}; accepted is {_LEAST_STEPS} or more.")
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
    # A line through all samples, as memory comes and goes by some pages. Theil and Sen: the median
    # of all slopes.
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
    """Until none is being written, and what wrote the last one has ended."""
    folder = workdir / "checkpoints"
    end = time.monotonic() + _PATIENCE
    while any(not (path / "manifest.json").is_file() for path in folder.glob("*")):
        if time.monotonic() > end:
            raise ValueError(f"no end of a checkpoint in {folder} within {_PATIENCE} s.")
        time.sleep(_SETTLING)
    time.sleep(_SETTLING)


def failures(growth: dict[str, Any]) -> list[str]:
    """What has grown, of memory by 1 % or more."""
    found = [name for name in ("files", "threads") if _grew(growth, name)]
    return (["memory"] if growth["memory_growth"] >= _LIMIT else []) + found


def _grew(growth: dict[str, Any], name: str) -> bool:
    return growth[f"{name}_after"] > growth[f"{name}_before"]


def main(argv: list[str] | None = None) -> None:
    """The command line; status 1 where something has grown."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.growth",
        description="Trains by configs/flowhn_tiny.py; do memory, open files and threads grow?",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="measured, behind a warm-up (%(default)s)"
    )
    options = parser.parse_args(argv)
    keep_freed_memory()  # as train.py
    try:
        with tempfile.TemporaryDirectory() as workdir:
            config = config_lib.parse(recipes.load("flowhn_tiny"))
            growth = measure_growth(workdir, config, options.steps)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print_result(growth)
    if grown := failures(growth):
        sys.exit(f"grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
