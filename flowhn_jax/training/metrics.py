"""The rows of metrics of a run, in metrics.jsonl and in TensorBoard's event file."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence

from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.checkpoints.rows import FILE, Row, merge_parts, read_rows, rows_and_ends
from flowhn_jax.report.table import to_json
from flowhn_jax.training.events import EventFile
from flowhn_jax.utils.files import check_own_file, sync
from flowhn_jax.utils.progress import log as print_line


def _drop_rows_after(folder: pathlib.Path, step: int) -> int:
    """Remove the rows of later steps, which a killed run wrote after its last checkpoint.

    Returns:
      The number of bytes after the last row.
    """
    path = folder / FILE
    if not path.is_file():
        return 0
    merge_parts(folder)
    rows = list(rows_and_ends(path.read_bytes(), str(path)))
    stray = path.stat().st_size - (rows[-1][1] if rows else 0)
    os.truncate(path, max((end for row, end in rows if row["step"] <= step), default=0))
    sync(path)
    return stray


class MetricsWriter:
    """Writes the rows of a run in a local workdir.

    Rows that do not fit on a full disk wait in memory, and are written with the next row.
    """

    def __init__(
        self,
        workdir: str,
        start: int,
        log: Callable[[str], None] = print_line,
        *,
        has_events: bool = True,
    ):
        """Continue the rows of `workdir` after step `start`, and drop later ones.

        Args:
          workdir: folder of the run.
          start: step of the checkpoint that the run continues from.
          log: prints a line for people.
          has_events: whether to write TensorBoard's file as well.
        """
        self._folder = pathlib.Path(workdir)
        check_own_file(self._folder / FILE)
        self._log, self._has_events = log, has_events
        self._waiting: list[Row] = []
        self._events: EventFile | None = None
        self.drop_rows_after(start)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_events()

    def drop_rows_after(self, step: int) -> None:
        """Drop the rows of later steps, because these steps will run again."""
        self._waiting.clear()
        if stray := _drop_rows_after(self._folder, step):
            self._log(f"{FILE} ended with {stray:,} bytes that are not a row; they were dropped")
        self._close_events()
        self._add_events([])

    def write(self, row: Row) -> None:
        """Write the row of a step."""
        self._waiting.append(row)
        self.flush()

    def flush(self) -> bool:
        """Write the rows that wait; return whether all are on the disk."""
        if not self._waiting:
            return True
        text = "".join(to_json(row) + "\n" for row in self._waiting)
        try:
            _append(self._folder / FILE, text.encode())
        except OSError as error:
            if not disk.is_full(error):
                raise
            self._log(
                f"the disk of {str(self._folder)!r} is full: {len(self._waiting)} rows of {FILE} "
                f"({len(text):,} bytes) wait to be written; free some space"
            )
            return False
        written, self._waiting = self._waiting, []
        self._add_events(written)
        return True

    def _add_events(self, rows: Sequence[Row]) -> None:
        """Add new rows to TensorBoard's file; if it is not open, begin another with all rows."""
        if not self._has_events:
            return
        try:
            if self._events is None:
                self._events = EventFile(self._folder / "tensorboard", read_rows(self._folder))
                return
            for row in rows:
                self._events.add(row)
        except OSError as error:
            if not disk.is_full(error):
                raise
            self._close_events()  # it lacks a row

    def _close_events(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
            self._events = None


def _append(path: pathlib.Path, text: bytes) -> None:
    """Append all of the text, or nothing if there is an OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while text:
                text = text[file.write(text) :]
            os.fsync(file.fileno())
            if not end:  # the file is new, so its name must reach the disk too
                sync(path.parent)
        except OSError:
            file.truncate(end)
            raise
