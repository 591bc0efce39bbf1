"""Where the rows of a run go: the writers of `train.writers`, with one interface."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.config import Config
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.storage import Lock, is_remote
from flowhn_jax.training import metrics
from flowhn_jax.training.bucket_metrics import BucketMetricsWriter
from flowhn_jax.training.trackers import TRACKERS, TrackerWriter


class Writer(Protocol):
    """Receives the rows of a run, in the order of their steps."""

    def drop_rows_after(self, step: int) -> None:
        """Drop the rows of later steps, because these steps will run again."""
        ...

    def write(self, row: Row) -> None:
        """Write the row of a step."""
        ...

    def flush(self) -> bool:
        """Write what waits; return whether all rows are where a resumed run finds them."""
        ...


class Writers:
    """Several writers as one, in order; none in all processes but the first."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def drop_rows_after(self, step: int) -> None:
        """Drop the rows of later steps, because these steps will run again."""
        for writer in self._writers:
            writer.drop_rows_after(step)

    def write(self, row: Row) -> None:
        """Write the row of a step."""
        for writer in self._writers:
            writer.write(row)

    def flush(self) -> bool:
        """Write what waits; return whether all rows are where a resumed run finds them."""
        return all(writer.flush() for writer in self._writers)


def check_packages(names: str) -> None:
    """Check that the first process, which writes, has the optional packages of `train.writers`.

    Raises:
      ImportError: one is missing; the message names it.
    """
    for name in names.split(","):
        if name not in TRACKERS or not is_first():
            continue
        try:
            # A folder `wandb` that earlier runs left is imported as an empty package.
            is_installed = hasattr(importlib.import_module(name), "init")
        except ImportError:
            is_installed = False
        if not is_installed:
            raise ImportError(
                f"train.writers has {name}, which needs the package '{name}': pip install {name}, "
                "or leave it out: --config.train.writers=jsonl,tensorboard"
            )


@contextlib.contextmanager
def open_writer(
    config: Config, workdir: str, start: int, log: Callable[[str], None], lock: Lock
) -> Iterator[Writer]:
    """Yield the writer of this process, which continues the rows of a run.

    Args:
      config: the config of the run.
      workdir: its folder.
      start: step of the checkpoint that the run continues from.
      log: prints a line for people.
      lock: the lock of the workdir.

    Raises:
      ValueError: a tracker does not start.
    """
    if not is_first():
        yield Writers([])
        return
    names = config.train.writers.split(",")
    has_events = "tensorboard" in names
    with contextlib.ExitStack() as stack:
        # The trackers come first, since they read the rows before the later ones are dropped.
        trackers = [
            stack.enter_context(TrackerWriter(name, config, workdir, start, log))
            for name in names
            if name in TRACKERS
        ]
        if is_remote(workdir):
            rows = BucketMetricsWriter(workdir, start, log, lock, has_events=has_events)
        else:
            rows = metrics.MetricsWriter(workdir, start, log, has_events=has_events)
        yield Writers([stack.enter_context(rows), *trackers])
