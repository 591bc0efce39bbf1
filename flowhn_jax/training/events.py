"""A run's rows of metrics as TensorBoard shows them."""

import pathlib
import re
import time
from collections.abc import Iterable
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

# The generated modules define their classes when they are imported, which the stubs do not say.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

_SUFFIX = ".flowhn"
# The names of a run's own event files, which earlier versions wrote without the suffix. Other
# event files in the folder stay.
_OURS = re.compile(rf"events\.out\.tfevents\..*\.\d{{19}}({re.escape(_SUFFIX)})?")

_VALIDATION = "validation_"
# Beginnings of keys.
_SPEED = ("tokens_per_second", "tflops_per_second", "mfu", "step_seconds")
_SPEED += ("data_wait", "checkpoint_seconds", "goodput")


def tags(row: dict[str, Any]) -> dict[str, float]:
    """Return a row's scalars by their TensorBoard tags, which group the charts.

    The groups are `train/`, `speed/` and `validation/`: `validation_loss` is `validation/loss`.
    """
    return {
        _tag(name): value
        for name, value in row.items()
        if name not in ("step", "time") and value is not None
    }


def _tag(name: str) -> str:
    if name.startswith(_VALIDATION):
        return f"validation/{name.removeprefix(_VALIDATION)}"
    return f"speed/{name}" if name.startswith(_SPEED) else f"train/{name}"


def is_event_file(name: str) -> bool:
    """Return whether a file of this name is a run's own event file."""
    return _OURS.fullmatch(name) is not None


class EventFile:
    """The event file of a run, written again from its rows whenever the run resumes.

    Each step is in it once, however often the run was killed. Every call writes at once, and raises
    OSError if the disk is full.
    """

    def __init__(self, folder: pathlib.Path, rows: Iterable[dict[str, Any]]):
        """Write the rows so far, and remove the event files of earlier starts."""
        folder.mkdir(exist_ok=True)
        earlier = [path for path in folder.iterdir() if is_event_file(path.name)]
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}{_SUFFIX}")
        # A TensorBoard that shows an earlier file drops its steps.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=0, session_log=restart))
        for row in rows:
            self._write(row)
        self._writer.flush()
        for path in earlier:
            path.unlink()

    def add(self, row: dict[str, Any]) -> None:
        """Write one more row."""
        self._write(row)
        self._writer.flush()

    def _write(self, row: dict[str, Any]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in tags(row).items()]
        # Rows of early versions have no time.
        now = row.get("time", time.time())
        self._writer.write_event(
            Event(wall_time=now, step=row["step"], summary=Summary(value=scalars))
        )

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
