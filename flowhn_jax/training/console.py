"""The output of a run while it trains: lines, and a progress bar in a terminal."""

import contextlib
import sys
from collections.abc import Callable

from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.utils.progress import Progress, activity, clock, log

OnStep = Callable[[], object]


class Console:
    """Lines on standard output and, in a terminal, a progress bar below them.

    Outside of a terminal only the lines are printed.
    """

    def __init__(self, enabled: bool, on_step: OnStep | None = None):
        """Show a run; the bar appears with `start_steps`.

        Args:
          enabled: whether to print anything, as the first process of a run does.
          on_step: called after each step.
        """
        self._enabled = enabled
        self._on_step = on_step
        self._steps: Progress[None] | None = None
        self._total = 0

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.end_steps()

    def log(self, text: str) -> None:
        """Print a line, above the progress bars if there are any."""
        if self._enabled:
            log(text)

    def activity(self, description: str) -> contextlib.AbstractContextManager[None]:
        """Show that work of unknown length is under way until the context ends."""
        return activity(description, self._enabled)

    def validating(self, batches: int) -> Progress[None]:
        """Return the progress of a validation of `batches` batches."""
        return Progress(batches, "validating", "batches", enabled=self._enabled)

    def start_steps(self, done: int, total: int) -> None:
        """Show the progress bar of the steps in a terminal, with `done` of `total` steps done."""
        self._total = total
        has_bar = self._enabled and sys.stderr.isatty()
        self._steps = Progress(
            total, "training", "steps", initial=done, leave=True, enabled=has_bar
        )

    def end_steps(self) -> None:
        """End the progress bar of the steps, if there is one; it stays as the last line."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def count_step(self) -> None:
        """Count a step as done."""
        if self._steps is not None:
            self._steps.update()
        if self._on_step is not None:
            self._on_step()

    def move_to(self, step: int) -> None:
        """Show that the run continues from an earlier step."""
        if self._steps is not None:
            self._steps.move_to(step)

    def show(self, row: Row) -> None:
        """Print a row of metrics as a line, and add its loss to the progress bar."""
        if self._steps is not None:
            loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"
            self._steps.annotate(f"loss {loss}")
        self.log(describe(row, self._total))


def describe(row: Row, total_steps: int) -> str:
    """Return the line that is printed for a row of metrics."""
    step = row["step"]
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"
    text = f"step {step:>6}/{total_steps}  loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
    text += f"  MFU {mfu}"
    if "validation_bits_per_byte" in row:
        text += f"  validation {row['validation_bits_per_byte']:.4f} bits/byte"
        text += _of_sets(row, "validation_bits_per_byte/", ".4f")
    if "validation_ema_bits_per_byte" in row:
        text += f"  (EMA {row['validation_ema_bits_per_byte']:.4f})"
        text += _of_sets(row, "validation_ema_bits_per_byte/", ".4f")
    if epochs := _of_sets(row, "epochs/", ".3g"):
        text += f"  epochs{epochs}"
    if step < total_steps:
        text += f"  {clock((total_steps - step) * row['step_seconds'])} left"
    return text


def _of_sets(row: Row, prefix: str, form: str) -> str:
    """Return the values of each set, such as ' (wiki 1.2345, code 0.9876)'; '' without any."""
    values = ((key.removeprefix(prefix), row[key]) for key in row if key.startswith(prefix))
    text = ", ".join(f"{name} {format(value, form)}" for name, value in values)
    return f" ({text})" if text else ""
