"""Watches a run's numbers: spikes of the loss, and steps that were skipped."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

_WINDOW = 64  # losses that the next one is held against,
_FEWEST = 16  # of which there must be so many
_DEVIATIONS = 6.0  # a spike is so many standard deviations above their mean,
_SHARE = 0.1  # and by this share of it


@dataclasses.dataclass
class Progress:
    """What a run keeps beside its state, in every checkpoint.

    Attributes:
      row: that of the checkpoint's step, where it waits for its validation.
      losses: the last finite ones.
      spikes: how many there were.
      rewinds: how often the run went back past data that made numbers not finite.
    """

    row: dict[str, Any] | None = None
    losses: list[float] = dataclasses.field(default_factory=list)
    spikes: int = 0
    rewinds: int = 0


class TooManySkipped(ValueError):
    """Too many steps in a row were skipped.

    Attributes:
      step: the last one.
      count: how many.
    """

    def __init__(self, step: int, count: int):
        super().__init__(f"the last {count} steps up to {step} had no finite loss or gradients")
        self.step = step
        self.count = count


class Monitor:
    """Is shown each step's metrics, in order."""

    def __init__(self, progress: Progress, max_skipped: int, say: Callable[[str], None]):
        """`progress` is kept up to date; at `max_skipped` steps in a row it is enough."""
        self.is_wary = max_skipped == 1  # whether the next skipped step may be one too many
        self._progress = progress
        self._max_skipped = max_skipped
        self._say = say

    def observe(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes a step's metrics, of `make_train_step`.

        Raises:
          TooManySkipped: it was the last of too many.
        """
        loss, in_row = metrics["loss"], int(metrics["skipped_in_row"])
        self.is_wary = in_row > 0 or self._max_skipped == 1
        if in_row:
            self._say(
                f"step {step} was skipped: loss {loss:g}, gradient norm {metrics['grad_norm']:g}"
            )
            if in_row >= self._max_skipped:
                raise TooManySkipped(step, in_row)
            return
        losses = self._progress.losses
        if len(losses) >= _FEWEST:
            mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
            if loss > mean + max(_DEVIATIONS * deviation, _SHARE * abs(mean)):
                self._progress.spikes += 1
                self._say(
                    f"step {step}: the loss of {loss:.4f} is a spike; the last {len(losses)} had "
                    f"the mean {mean:.4f} and the standard deviation {deviation:.4f}"
                )
        if math.isfinite(loss):
            losses.append(loss)
            del losses[:-_WINDOW]
