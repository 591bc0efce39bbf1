"""What a run reports: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import tensorboardX
import tqdm

from flowhn_jax.report.table import to_json

Row = dict[str, Any]
OnStep = Callable[[], None]

_FILE = "metrics.jsonl"


def read_rows(workdir: str) -> list[Row]:
    """The rows of a workdir's metrics.jsonl; a last line cut off by a kill is left out."""
    path = pathlib.Path(workdir) / _FILE
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _drop_rows_after(workdir: str, step: int) -> None:
    """Removes what a killed run logged beyond the checkpoint that the next one starts from."""
    path = pathlib.Path(workdir) / _FILE
    kept = [row for row in read_rows(workdir) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(temporary, path)


def describe(row: Row) -> str:
    """A row in words, for people."""
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  MFU {mfu}"
    if "validation_bits_per_byte" in row:
        text += f"  validation {row['validation_bits_per_byte']:.4f} bits/byte"
    return text


class SilentWriter:
    """A MetricsWriter that writes and says nothing: that of all processes but the first."""

    def __init__(self, workdir: str, start: int, steps: int, on_step: OnStep | None = None):
        """As MetricsWriter."""

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def advance(self) -> None:
        """One step is done."""

    def say(self, text: str) -> None:
        """A line for people."""

    def write(self, row: Row) -> None:
        """Logs one step's row."""


class MetricsWriter:
    """Writes a run's rows; use as a context manager, in one process only."""

    def __init__(self, workdir: str, start: int, steps: int, on_step: OnStep | None = None):
        """Rows after step `start` that an earlier run left are dropped; `steps` are to be done.

        With `on_step`, which is called behind each step, nothing is printed.
        """
        self._on_step = on_step
        _drop_rows_after(workdir, start)
        self._file = (pathlib.Path(workdir) / _FILE).open("a")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=start + 1, write_to_disk=True
        )
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=on_step is not None or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()
        if self._on_step is not None:
            self._on_step()

    def say(self, text: str) -> None:
        """A line for people, above the progress bar where there is one."""
        if self._on_step is None:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, row: Row) -> None:
        """Logs one step's row."""
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, row["step"])
        text = describe(row)
        self._bar.set_postfix_str(text)
        if self._bar.disable or "validation_bits_per_byte" in row:
            self.say(f"step {row['step']:>6}/{self._bar.total}  {text}")
