"""A run's rows as TensorBoard shows them."""

import pathlib
import re
import time
from collections.abc import Iterable
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_SUFFIX = ".flowhn"
# What a run made, in earlier versions without the suffix; other event files are somebody else's.
_OURS = re.compile(rf"events\.out\.tfevents\..*\.\d{{19}}({re.escape(_SUFFIX)})?")


class EventFile:
    """The one event file of a run; it is drawn again whenever the run resumes.

    So each step is there once, however often the run was killed. Calls write at once, and raise
    OSError where the disk is full.
    """

    def __init__(self, folder: pathlib.Path, rows: Iterable[dict[str, Any]]):
        """Write the rows so far, and remove the files of this run's earlier starts."""
        folder.mkdir(exist_ok=True)
        earlier = [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}{_SUFFIX}")
        # Whoever still shows an earlier file forgets its steps.
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=0, session_log=restart))
        for row in rows:
            self._write(row)
        self._writer.flush()
        for path in earlier:
            path.unlink()

    def add(self, row: dict[str, Any]) -> None:
        """One more row."""
        self._write(row)
        self._writer.flush()

    def _write(self, row: dict[str, Any]) -> None:
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in ("step", "time") and value is not None
        ]
        # Rows of before there were times are of now.
        now = row.get("time", time.time())
        self._writer.write_event(
            Event(wall_time=now, step=row["step"], summary=Summary(value=scalars))
        )

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
