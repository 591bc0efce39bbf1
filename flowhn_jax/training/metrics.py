"""What a run reports: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.report.table import to_json
from flowhn_jax.training.events import EventFile
from flowhn_jax.utils.files import check_own_file, sync

Row = dict[str, Any]
OnStep = Callable[[], None]

_FILE = "metrics.jsonl"


def read_rows(workdir: str | os.PathLike) -> list[Row]:
    """The rows of a workdir's metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
      ValueError: a line before the last is not a row.
    """
    return [row for row, _ in _rows_and_ends(pathlib.Path(workdir) / _FILE)]


def _rows_and_ends(path: pathlib.Path) -> Iterator[tuple[Row, int]]:
    """Yield the rows of a file, and the bytes up to the end of each.

    What follows the last row is left out where it holds none: a line cut off by a kill, or the
    zeros that a power cut leaves.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    rows = [_parse_row(line) for line in lines]
    count = max((number for number, row in enumerate(rows, 1) if row is not None), default=0)
    end = 0
    for number, (line, row) in enumerate(zip(lines[:count], rows, strict=False), 1):
        if row is None:
            raise ValueError(f"{str(path)!r} is damaged: line {number} is not a row.")
        end += len(line)
        yield row, end


def _parse_row(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _drop_rows_after(folder: pathlib.Path, step: int) -> int:
    """Remove what a killed run logged beyond the checkpoint that the next one starts from.

    Returns:
      The bytes among them that were no rows.
    """
    path = folder / _FILE
    if not path.is_file():
        return 0
    rows = list(_rows_and_ends(path))
    no_rows = path.stat().st_size - (rows[-1][1] if rows else 0)
    os.truncate(path, max((end for row, end in rows if row["step"] <= step), default=0))
    sync(path)
    return no_rows


def describe(row: Row) -> str:
    """A row in words, for people."""
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
    loss = "n/a" if row["loss"] is None else f"{row['loss']:.4f}"
    text = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s  MFU {mfu}"
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

    def drop_rows_after(self, step: int) -> None:
        """The run goes on from `step`."""

    def flush(self) -> bool:
        """Whether all rows are written."""
        return True

    def advance(self) -> None:
        """One step is done."""

    def say(self, text: str) -> None:
        """A line for people."""

    def write(self, row: Row) -> None:
        """Logs one step's row."""


class MetricsWriter:
    """Writes a run's rows; use as a context manager, in one process only.

    Rows that a full disk does not take wait, and are written with the next one; see `settled`.
    """

    def __init__(self, workdir: str, start: int, steps: int, on_step: OnStep | None = None):
        """Rows after step `start` that an earlier run left are dropped; `steps` are to be done.

        With `on_step`, which is called behind each step, nothing is printed.
        """
        self._folder = pathlib.Path(workdir)
        check_own_file(self._folder / _FILE)
        self._on_step = on_step
        self._waiting: list[Row] = []
        self._events: EventFile | None = None
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=on_step is not None or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.drop_rows_after(start)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def drop_rows_after(self, step: int) -> None:
        """The run goes on from `step`: rows of later steps are of work that is lost."""
        self._waiting.clear()
        if no_rows := _drop_rows_after(self._folder, step):
            self.say(f"{_FILE} ended with {no_rows:,} bytes that are no row; they are dropped")
        self._draw(None)
        self._bar.n = step

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
        self._waiting.append(row)
        if self.flush():
            self._draw(row)
        text = describe(row)
        self._bar.set_postfix_str(text)
        if self._bar.disable or "validation_bits_per_byte" in row:
            self.say(f"step {row['step']:>6}/{self._bar.total}  {text}")

    def flush(self) -> bool:
        """Writes what waits; whether all rows are on the disk, without which no checkpoint is."""
        if not self._waiting:
            return True
        text = "".join(to_json(row) + "\n" for row in self._waiting)
        try:
            _append(self._folder / _FILE, text.encode())
        except OSError as error:
            if not disk.is_full(error):
                raise
            self.say(
                f"the disk of {str(self._folder)!r} is full: {_FILE} lacks {len(text):,} bytes for "
                f"{len(self._waiting)} rows, which wait"
            )
            return False
        self._waiting.clear()
        return True

    def _draw(self, row: Row | None) -> None:
        """TensorBoard's copy of the row; of all rows, where there is no file or it has a gap."""
        try:
            if row is None or self._events is None:
                self._events = EventFile(self._folder / "tensorboard", read_rows(self._folder))
            else:
                self._events.add(row)
        except OSError as error:
            if not disk.is_full(error):
                raise
            self._events = None


def _append(path: pathlib.Path, text: bytes) -> None:
    """Appends all of the text, or on an OSError nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while text:
                text = text[file.write(text) :]
            os.fsync(file.fileno())
            if not end:  # its name is new
                sync(path.parent)
        except OSError:
            file.truncate(end)
            raise
