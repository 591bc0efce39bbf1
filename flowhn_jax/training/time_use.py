"""What the wall time of a run goes to, from its start or resume on."""

import contextlib
import enum
import time
from collections.abc import Callable, Iterator

from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.utils.progress import clock as clock_text

_LATE = 1e-3  # seconds of waiting that show that the data do not keep up


class Activity(enum.StrEnum):
    """What time is spent on, in words."""

    STEPS = "steps"
    COMPILING = "compiling"
    DATA = "waiting for data"
    CHECKPOINTS = "checkpoints"
    VALIDATION = "validation"
    OTHER = "other"


class TimeUse:
    """Divides the wall time since its creation among activities; each moment counts for one.

    Attributes:
      data_are_late: whether the last step waited for its data.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        """Start; `clock` returns the time in seconds."""
        self._clock = clock
        self._start = self._since = clock()
        self._activity = Activity.OTHER
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._at_row = dict(self._seconds)  # at the last row
        self._steps = 0  # since the last row
        self.data_are_late = False

    @contextlib.contextmanager
    def spent_on(self, activity: Activity) -> Iterator[None]:
        """Count the time in the context for an activity, without that of nested contexts."""
        before = self._activity
        self._switch_to(activity)
        try:
            yield
        finally:
            self._switch_to(before)

    def _switch_to(self, activity: Activity) -> None:
        now = self._clock()
        self._seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now

    def count_step(self, waited: float) -> None:
        """Count a step, in whose time `waited` seconds were spent waiting for data."""
        self._steps += 1
        self._seconds[Activity.STEPS] -= waited
        self._seconds[Activity.DATA] += waited
        self.data_are_late = waited > _LATE

    def row(self) -> Row:
        """Return what a row of metrics holds; the next one counts from here."""
        self._switch_to(self._activity)
        row = {
            "data_wait": (self._seconds[Activity.DATA] - self._at_row[Activity.DATA])
            / max(self._steps, 1),
            "checkpoint_seconds": self._seconds[Activity.CHECKPOINTS]
            - self._at_row[Activity.CHECKPOINTS],
            "goodput": self._seconds[Activity.STEPS] / (self._since - self._start),
        }
        self._at_row, self._steps = dict(self._seconds), 0
        return row

    def describe(self) -> str:
        """Return the line that is printed at the end of a run."""
        self._switch_to(self._activity)
        total = self._since - self._start
        shares = (f"{name} {self._seconds[name] / total:.1%}" for name in Activity)
        return f"{clock_text(total)} since the start: {', '.join(shares)}"
