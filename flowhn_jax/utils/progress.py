"""Progress of long work: a bar in a terminal, a plain line every 10 seconds elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from flowhn_jax.utils.periodic import repeating

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_FRAMES = 0.25
_BAR = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
_COUNTER = "{desc}: {n_fmt} {unit} in {elapsed}{postfix}"
_SPINNER = "{desc} ... {elapsed}"


class Progress(Generic[T]):
    """An iterable that shows its progress, or a context manager with `update` to call.

    In a terminal it is a bar on standard error with the time left. Elsewhere it is a plain line
    every 10 seconds; shorter work prints nothing. Only the first process shows it.
    """

    def __init__(
        self,
        items: Iterable[T] | int,
        description: str,
        unit: str = "items",
        *,
        total: int | None = None,
        initial: int = 0,
        leave: bool = False,
        enabled: bool = True,
    ):
        """Show the progress of `description`.

        Args:
          items: what to iterate over, or the number of units that `update` will count.
          description: what is being done, such as "validating".
          unit: plural name of what is counted, such as "batches".
          total: number of units where `items` is an iterable without a length.
          initial: units that are done already.
          leave: whether the bar stays in the terminal when it is complete.
          enabled: whether to show anything.
        """
        if isinstance(items, int):
            self._items: Iterable[T] = ()
            self.total: int | None = items
        else:
            self._items = items
            length = getattr(items, "__len__", None)
            self.total = length() if total is None and length is not None else total
        self.done = initial
        self._description, self._unit = description, unit
        self._initial = initial
        self._start = self._last_line = time.monotonic()
        self._annotation = ""
        self._shows_lines = False
        self._bar: tqdm | None = None
        if not enabled or not _is_first_process():
            return
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.total,
                initial=initial,
                desc=description,
                unit=unit,
                bar_format=_COUNTER if self.total is None else _BAR,
                leave=leave,
                file=sys.stderr,
                **_size(),
            )
        else:
            self._shows_lines = True

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> "Progress[T]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shows_lines:
            now = time.monotonic()
            if now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                print(self._line(now - self._start), file=sys.stderr, flush=True)

    def move_to(self, done: int) -> None:
        """Continue from another number of units, which may be smaller."""
        self.done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def annotate(self, text: str) -> None:
        """Show a text after the bar, such as the latest loss, or at the end of the next lines."""
        self._annotation = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Remove the bar, or leave it as the last line if it was created with `leave`."""
        if self._bar is not None:
            self._bar.close()
        self._shows_lines = False

    def _line(self, seconds: float) -> str:
        """Return the progress after `seconds` as a line of text."""
        annotation = f", {self._annotation}" if self._annotation else ""
        if not self.total:
            done = f"{self._description}: {self.done:,} {self._unit}"
            return f"{done} in {clock(seconds)}{annotation}"
        text = f"{self._description}: {100 * self.done / self.total:.0f} %, "
        text += f"{self.done:,}/{self.total:,} {self._unit}"
        here = self.done - self._initial
        if here > 0:
            text += f", {clock(seconds / here * max(0, self.total - self.done))} left"
        return text + annotation


def progress(
    items: Iterable[T] | int,
    description: str,
    unit: str = "items",
    *,
    total: int | None = None,
    enabled: bool = True,
) -> Progress[T]:
    """Return the progress of iterating over `items`, or of `items` units counted by `update`.

    `for batch in progress(batches, "scoring", "batches"): ...`
    `with progress(size, "downloading", "bytes") as bar: bar.update(count)`

    Args:
      items: what to iterate over, or the number of units.
      description: what is being done.
      unit: plural name of what is counted.
      total: number of units where `items` is an iterable without a length.
      enabled: whether to show anything.
    """
    return Progress(items, description, unit, total=total, enabled=enabled)


@contextlib.contextmanager
def activity(description: str, enabled: bool = True) -> Iterator[None]:
    """Show that work of unknown length is under way, such as compiling.

    In a terminal a counter of the elapsed time moves on standard error until the context ends;
    elsewhere one plain line is printed at its start.
    """
    if not enabled or not _is_first_process():
        yield
        return
    if not sys.stderr.isatty():
        print(f"{description} ...", file=sys.stderr, flush=True)
        yield
        return
    bar = tqdm(desc=description, bar_format=_SPINNER, leave=False, file=sys.stderr, **_size())

    def move() -> bool:
        bar.refresh()
        return True

    try:
        with repeating(move, _SECONDS_BETWEEN_FRAMES, "progress", joins=True):
            yield
    finally:
        bar.close()


def log(text: str) -> None:
    """Print a line to standard output, above the progress bars if there are any."""
    if sys.stderr.isatty():
        tqdm.write(text, file=sys.stdout)
    else:
        print(text)
    sys.stdout.flush()


def clock(seconds: float) -> str:
    """Return a duration as "m:ss" or "h:mm:ss"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _size() -> dict[str, Any]:
    """Return tqdm's options for the size of the terminal; 80 x 24 if the terminal has none."""
    with contextlib.suppress(OSError):
        if os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"dynamic_ncols": True}
    return {"ncols": 80, "nrows": 24}


def _is_first_process() -> bool:
    """Return whether this is the first process of the run, without initializing JAX."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0
