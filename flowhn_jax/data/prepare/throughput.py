"""Throughput: a progress bar of the bytes of a source, with the bytes per second."""

import collections
import contextlib
import time
from collections.abc import Iterator

from flowhn_jax.utils.progress import Progress

_SECONDS_BETWEEN_RATES = 0.5


class Throughput(contextlib.ExitStack):
    """The progress of preparing a source, whose bytes count when their task has ended."""

    def __init__(self, size: int | None):
        """Show the progress bar.

        Args:
          size: the size of the source, in bytes; None if unknown.
        """
        super().__init__()
        nothing: Iterator[None] = iter(())
        bar: Progress[None] = Progress(nothing if size is None else size, "preparing", "bytes")
        self._bar = self.enter_context(bar)
        self._start = self._last = time.monotonic()
        self._read = 0  # since the last task began
        self._tasks: collections.deque[int] = collections.deque()

    def add(self, count: int) -> None:
        """Count bytes that were read for the next task."""
        self._read += count

    def begin(self) -> None:
        """Begin a task with the bytes that were read since the last one began."""
        self._tasks.append(self._read)
        self._read = 0

    def end(self) -> None:
        """End the first task that has not ended."""
        done, now = self._tasks.popleft(), time.monotonic()
        if now - self._last > _SECONDS_BETWEEN_RATES:
            self._last = now
            rate = (self._bar.done + done) / (now - self._start)
            self._bar.annotate(f"{rate / 1e6:,.1f} MB/s")
        self._bar.update(done)
