"""Watches the numbers of a run: spikes of the loss, and skipped steps."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax

_WINDOW = 64  # losses that the next one is compared with
_MIN_LOSSES = 16  # that are needed for a comparison
_DEVIATIONS = 6.0  # a spike exceeds the mean by this many standard deviations,
_SHARE = 0.1  # and by this share of the mean


@dataclasses.dataclass
class RunProgress:
    """What every checkpoint holds of a run, apart from its state.

    Attributes:
      row: the metrics of the checkpoint's step, if they still wait for their validation.
      losses: the last finite ones.
      spikes: number of spikes of the loss.
      rewinds: how often the run has gone back to skip data that made numbers not finite.
    """

    row: dict[str, Any] | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    spikes: int = 0
    rewinds: int = 0


class TooManySkippedError(ValueError):
    """Too many steps in a row were skipped.

    Attributes:
      step: the last one.
      count: number of steps.
    """

    def __init__(self, step: int, count: int):
        super().__init__(f"the last {count} steps up to {step} had no finite loss or gradients")
        self.step = step
        self.count = count


class Monitor:
    """Reads and checks the metrics of each step, in order.

    The newest step's metrics are read one step later, so that the devices always have work.
    """

    def __init__(self, progress: RunProgress, max_skipped: int, log: Callable[[str], None]):
        """Watch a run.

        Args:
          progress: the progress of the run, which `observe` updates.
          max_skipped: number of skipped steps in a row that are too many.
          log: prints a line for people.
        """
        self._progress = progress
        self._max_skipped = max_skipped
        self._log = log
        self._unread: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        # The next skipped step may be one too many: read each step's metrics at once.
        self.is_wary = max_skipped == 1

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of a step that was dispatched."""
        self._unread.append((step, metrics))

    def read(self, everything: bool) -> dict[str, float]:
        """Wait for steps and observe their metrics; return those of the last one read.

        Args:
          everything: whether to read the newest step too. It is also read if the step before it was
            skipped.

        Raises:
          TooManySkippedError: as `observe`.
        """
        values: dict[str, float] = {}
        while len(self._unread) > (0 if everything or self.is_wary else 1):
            step, metrics = self._unread.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            self.observe(step, values)
        values.pop("skipped_in_row", None)
        return values

    def observe(self, step: int, metrics: dict[str, Any]) -> None:
        """Check the metrics of a step, as `make_train_step` returns them.

        Raises:
          TooManySkippedError: it was the last of `max_skipped` skipped steps in a row.
        """
        loss, in_row = metrics["loss"], int(metrics["skipped_in_row"])
        self.is_wary = in_row > 0 or self._max_skipped == 1
        if in_row:
            self._log(
                f"step {step} was skipped: loss {loss:g}, gradient norm {metrics['grad_norm']:g}"
            )
            if in_row >= self._max_skipped:
                raise TooManySkippedError(step, in_row)
            return
        losses = self._progress.losses
        if len(losses) >= _MIN_LOSSES:
            mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
            if loss > mean + max(_DEVIATIONS * deviation, _SHARE * abs(mean)):
                self._progress.spikes += 1
                self._log(
                    f"step {step}: the loss of {loss:.4f} is a spike; the last {len(losses)} had "
                    f"the mean {mean:.4f} and the standard deviation {deviation:.4f}"
                )
        if math.isfinite(loss):
            losses.append(loss)
            del losses[:-_WINDOW]
