"""The rows of a run whose workdir is a bucket, which has no appending."""

import pathlib
import tempfile
import threading
from collections.abc import Callable
from typing import NamedTuple

from flowhn_jax.checkpoints.rows import Row, part_name, parts_of, rows_and_ends
from flowhn_jax.report.table import to_json
from flowhn_jax.storage import Lock, StorageError, place
from flowhn_jax.training.events import EventFile, is_event_file
from flowhn_jax.utils.text import one_line

_PART_BYTES = 10_000_000  # above which a new part begins
_SECONDS_BETWEEN_UPLOADS = 60.0
_SECONDS_BETWEEN_TRIES = 10.0
_SECONDS_TO_FLUSH = 30.0  # how long the run waits for an upload before it continues without
_SECONDS_AT_THE_END = 30.0


class _Line(NamedTuple):
    step: int
    text: bytes


class _Upload(NamedTuple):
    """What the bucket must hold for a version of the rows."""

    version: int
    parts: dict[int, bytes]  # by number, those to write
    count: int  # of all parts
    events: tuple[str, bytes] | None  # name and content of TensorBoard's file


class BucketMetricsWriter:
    """Writes the rows of a run whose workdir is in a bucket.

    All rows are in memory. A thread writes the last part of metrics.jsonl as a whole, and
    TensorBoard's file, which is local until then: after each validation, once a minute, and when
    `flush` waits for it, as the run does before each checkpoint. A part has up to 10 MB.
    """

    def __init__(
        self,
        workdir: str,
        start: int,
        log: Callable[[str], None],
        lock: Lock,
        *,
        has_events: bool = True,
    ):
        """Continue the rows of `workdir` after step `start`, and drop later ones.

        Args:
          workdir: folder of the run.
          start: step of the checkpoint that the run continues from.
          log: prints a line for people.
          lock: the lock of the workdir; without it nothing is written.
          has_events: whether to write TensorBoard's file as well.
        """
        self._folder, self._log, self._run_lock = place(workdir), log, lock
        self._has_events = has_events
        self._temporary = tempfile.TemporaryDirectory()
        self._changed = threading.Condition()  # guards what follows
        self._parts: list[list[_Line]] = [[]]
        self._bytes = 0  # of the last part
        self._events: EventFile | None = None
        self._first_to_write = 0  # number of the first part that the bucket lacks
        self._version, self._written = 1, 0
        self._is_due = self._is_over = False
        self._error: Exception | None = None
        self._stored = 0  # parts in the bucket
        self._read()
        self.drop_rows_after(start)
        self._thread = threading.Thread(target=self._upload_all, name="metrics", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for number, part in enumerate(parts_of(self._folder)):
            content, begin = part.read(), 0
            lines = []
            for row, end in rows_and_ends(content, str(part)):
                lines.append(_Line(row["step"], content[begin:end]))
                begin = end
            self._parts[number:] = [lines]
            self._stored = number + 1
            if stray := len(content) - begin:
                self._log(
                    f"{part.name} ended with {stray:,} bytes that are not a row; they were dropped"
                )

    def __enter__(self) -> "BucketMetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._run_lock.error() is None and not self._wait(_SECONDS_AT_THE_END):
                self._log(f"the last rows were not written to {self._folder}")
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            self._thread.join()
            if self._events is not None:
                self._events.close()
            self._temporary.cleanup()

    def drop_rows_after(self, step: int) -> None:
        """Drop the rows of later steps, because these steps will run again."""
        with self._changed:
            for number, lines in enumerate(self._parts):
                kept = [line for line in lines if line.step <= step]
                if len(kept) < len(lines):
                    self._first_to_write = min(self._first_to_write, number)
                self._parts[number] = kept
            while len(self._parts) > 1 and not self._parts[-1]:
                self._parts.pop()
            self._first_to_write = min(self._first_to_write, len(self._parts) - 1)
            self._bytes = sum(len(line.text) for line in self._parts[-1])
            self._restart_events()
            self._version += 1

    def _restart_events(self) -> None:
        if not self._has_events:
            return
        if self._events is not None:
            self._events.close()
        text = b"".join(line.text for lines in self._parts for line in lines)
        rows = [row for row, _ in rows_and_ends(text, str(self._folder))]
        self._events = EventFile(pathlib.Path(self._temporary.name) / "tensorboard", rows)

    def write(self, row: Row) -> None:
        """Keep the row of a step, to be written with the next upload."""
        self._raise_error()
        line = _Line(row["step"], (to_json(row) + "\n").encode())
        with self._changed:
            if self._bytes > _PART_BYTES:
                self._parts.append([])
                self._bytes = 0
            self._parts[-1].append(line)
            self._bytes += len(line.text)
            self._first_to_write = min(self._first_to_write, len(self._parts) - 1)
            if self._events is not None:
                self._events.add(row)
            self._version += 1
            if "validation_loss" in row:
                self._is_due = True
                self._changed.notify_all()

    def flush(self) -> bool:
        """Write the rows that wait; return whether all are in the bucket."""
        is_written = self._wait(_SECONDS_TO_FLUSH)
        self._raise_error()
        if not is_written:
            self._log(f"rows of {part_name(0)} wait to be written to {self._folder}")
        return is_written

    def _wait(self, seconds: float) -> bool:
        with self._changed:
            wanted = self._version
            self._is_due = self._written < wanted
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._written >= wanted or self._error is not None, seconds
            )
            return self._written >= wanted

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _upload_all(self) -> None:
        """Write what has changed, whenever it is due, until the run is over."""
        is_failing = False
        while True:
            with self._changed:
                pause = _SECONDS_BETWEEN_TRIES if is_failing else _SECONDS_BETWEEN_UPLOADS
                self._changed.wait_for(lambda: self._is_over or self._is_due, pause)
                if self._is_over:
                    return
                if self._written == self._version:
                    continue
                self._is_due = False
            upload = None
            try:
                with self._changed:
                    upload = self._snapshot()
                self._run_lock.confirm()
                self._upload(upload)
                is_failing = False
            except StorageError as error:
                if upload is not None:
                    with self._changed:
                        self._first_to_write = min([self._first_to_write, *upload.parts])
                if not is_failing:
                    self._log(f"rows wait to be written: {one_line(error)}")
                is_failing = True
            except Exception as error:  # raised in the run's thread
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _snapshot(self) -> _Upload:
        parts = {
            number: b"".join(line.text for line in self._parts[number])
            for number in range(self._first_to_write, len(self._parts))
        }
        if not self._stored and not any(parts.values()):
            parts = {}
        self._first_to_write = len(self._parts) - 1
        events = None
        if self._has_events:
            (path,) = (pathlib.Path(self._temporary.name) / "tensorboard").iterdir()
            events = path.name, path.read_bytes()
        return _Upload(self._version, parts, len(self._parts), events)

    def _upload(self, upload: _Upload) -> None:
        # Remove the last part first: the bucket always holds the rows up to some step.
        for number in reversed(range(upload.count, self._stored)):
            (self._folder / part_name(number)).remove()
        for number, content in upload.parts.items():
            (self._folder / part_name(number)).write_whole(content)
            self._stored = max(self._stored, number + 1)
        self._stored = min(self._stored, upload.count)
        if upload.events is not None:
            self._upload_events(*upload.events)
        with self._changed:
            self._written = upload.version
            self._changed.notify_all()

    def _upload_events(self, name: str, content: bytes) -> None:
        """Write TensorBoard's file, and remove those of earlier starts."""
        folder = self._folder / "tensorboard"
        (folder / name).write_whole(content)
        for path in folder.children():
            if is_event_file(path.name) and path.name != name:
                path.remove()
