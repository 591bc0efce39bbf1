"""Gives each part its time, keeps its rows, and survives whatever happens to the worker."""

import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite.document import Document
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.bench.suite.worker import Request, serve

LOG = "suite.log"

_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_SAVES = 1.0
_MAX_LOG_BYTES = 2**23  # then it begins again: a library may repeat one warning without end
_LEAST_TURN = 3.0  # seconds that are worth starting a part for

_Message = tuple[Any, ...]


class Stop(Exception):
    """A signal asks the suite to stop, or its minutes are over."""


class _Kind(NamedTuple):
    """What tells workers apart: settings that a process has for all of its life."""

    environment: dict[str, str]
    keeps_memory: bool


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self, kind: _Kind, log: pathlib.Path, cache: pathlib.Path, describes: str):
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        environment, keeps_memory = kind
        arguments = theirs, environment, str(log), str(cache), describes, keeps_memory
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Supervisor:
    """Runs the parts of a suite that are missing, for a number of seconds."""

    def __init__(
        self,
        parts: Sequence[Part],
        document: Document,
        folder: pathlib.Path,
        *,
        seconds: float,
        describes: str,
        log: Callable[[str], None],
        on_part: Callable[[], None],
    ):
        """The arguments:

        Args:
          parts: in the order of their value.
          document: of the folder; receives the rows.
          folder: for suite.log; the compilation cache is in its parent.
          seconds: to run at the most.
          describes: module whose `describe()` identifies the machine.
          log: prints a line of progress.
          on_part: called after each part, when its rows are on the disk.
        """
        self._parts, self._document, self._folder = parts, document, folder
        self._describes, self._log, self._on_part = describes, log, on_part
        self._worker: _Worker | None = None
        self._start = time.monotonic()
        self._end = self._start + seconds
        self._spent_before: float = document.content["seconds"]
        self._saved, self._is_unsaved = 0.0, False
        self.stopped_by: str | None = None  # the signal's name

    def run(self) -> None:
        """Run the parts until nothing is missing, the time is over or a signal comes.

        Parts run in their order, each for its share of the time; what was cut is continued after
        the last one. A signal is answered within a second.

        Raises:
          ValueError: the folder holds the results of another machine.
          RuntimeError: the worker cannot start, or cannot use the device.
        """
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while turns := self._turns():
                for i, part in enumerate(turns):
                    self._run_part(part, self._allotted(turns[i:]))
        except Stop:
            pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._end_worker()
            self._save()

    def _on_signal(self, number: int, _: Any) -> None:
        self.stopped_by = signal.Signals(number).name

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _turns(self) -> list[Part]:
        """Return the unfinished parts that are worth starting in the time that is left."""
        parts = [part for part in self._parts if self._is_unfinished(part)]
        if self._left() < _LEAST_TURN:
            return []
        while len(parts) > 1:
            total = sum(part.share for part in parts)
            short = [part for part in parts[1:] if part.share / total * self._left() < part.least]
            if not short:
                break
            parts.remove(short[-1])
        return parts

    def _is_unfinished(self, part: Part) -> bool:
        failed = self._document.part(part.name)["failed"]
        return failed is None and self._document.missing(part.name) != []

    def _allotted(self, turns: Sequence[Part]) -> float:
        """Return the seconds of the first of the parts that are to come."""
        share = turns[0].share / sum(part.share for part in turns)
        return max(share * self._left(), turns[0].least)

    def _run_part(self, part: Part, seconds: float) -> None:
        """Run a part for its time; after a death of the worker, key by key, to find the cause."""
        start, end = time.monotonic(), time.monotonic() + seconds
        record = self._document.part(part.name)
        self._log(f"\n{part.title} ({seconds:.0f} s)")
        try:
            if self._request(part, self._document.missing(part.name), end) is not None:
                while keys := self._document.missing(part.name):
                    if death := self._request(part, keys[:1], end):
                        self._add(part, {"key": keys[0], "failed": death})
        except TimeoutError:
            record["postponed"] += (self._document.missing(part.name) or [])[:1]
            self._log("  its time is over")
            self._end_worker()
        finally:
            record["seconds"] += time.monotonic() - start
            self._save()
            self._on_part()

    def _request(self, part: Part, keys: list[str] | None, end: float) -> str | None:
        """Run keys of a part; return how the worker died, None where it did not.

        Raises:
          TimeoutError: the part's time is over.
          Stop: the suite's time is over, or a signal has come.
        """
        worker = self._worker_for(part, end)
        try:
            worker.connection.send(Request(part.module, keys, self._document.rows()))
            self._follow(worker, part, keys, end)
        except (EOFError, ConnectionError):
            death, record = self._death(), self._document.part(part.name)
            if record["planned"] is None:
                record["failed"] = death
                self._log(f"  failed: {death}")
            return death
        return None

    def _follow(self, worker: _Worker, part: Part, keys: list[str] | None, end: float) -> None:
        """Take what the worker sends until it has done what it was asked for."""
        record = self._document.part(part.name)
        while True:
            kind, *values = self._receive(worker, end)
            if kind == "plan":
                record["planned"] = values[0]
            elif kind == "row":
                self._add(part, values[0])
            elif kind == "failed":
                record["failed"] = values[0]
                self._log(f"  failed: {values[0]}")
                return
            else:  # 'done'; a part that forgets a key must not be asked for it again
                missing = self._document.missing(part.name) or []
                for key in missing if keys is None else set(keys) & set(missing):
                    self._add(part, {"key": key, "failed": "the part gave no result"})
                return

    def _worker_for(self, part: Part, end: float) -> _Worker:
        """Return a worker of the kind that the part wants, the one there is where it is of it."""
        while not self._is_usable(part):
            self._end_worker()
            self._start_worker(self._kind(part), end)
        return self._worker

    def _is_usable(self, part: Part) -> bool:
        worker = self._worker
        return worker is not None and worker.process.is_alive() and worker.kind == self._kind(part)

    def _kind(self, part: Part) -> _Kind:
        platform = (self._document.content["machine"] or {}).get("platform")
        return _Kind(dict(part.environment), platform == "cpu" and part.is_timed)

    def _start_worker(self, kind: _Kind, end: float) -> None:
        """Start a worker, and learn what machine this is."""
        log, cache = self._folder / LOG, self._folder.absolute().parent / "compilation_cache"
        self._worker = _Worker(kind, log, cache, self._describes)
        try:
            _, machine = self._receive(self._worker, end)
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"The worker cannot use the device: {self._death()}; its messages are in "
                f"{str(log)!r}."
            ) from None
        self._document.check_machine(machine)

    def _receive(self, worker: _Worker, end: float) -> _Message:
        while True:
            if self.stopped_by is not None or self._left() <= 0:
                raise Stop
            if time.monotonic() >= end:
                raise TimeoutError
            if worker.connection.poll(_POLL_SECONDS):
                return worker.connection.recv()
            self._save_soon()
            # Its end of the connection may outlive it, in a process that it started.
            if not worker.process.is_alive() and not worker.connection.poll():
                raise EOFError

    def _add(self, part: Part, row: Row) -> None:
        self._document.add(part.name, row)
        if failed := row.get("failed"):
            self._log(f"  {row['key']}: failed: {failed}")
        elif not row.get("partial"):
            self._log(f"  {row['key']}" + (f": {row['summary']}" if "summary" in row else ""))
        self._is_unsaved = True
        self._save_soon()

    def _death(self) -> str:
        """Return how the worker died, and forget it."""
        assert self._worker is not None
        self._worker.process.join()
        code = self._worker.process.exitcode or 0
        self._end_worker()
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return f"the worker process died ({how})"

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _save_soon(self) -> None:
        """Save what is new, but not more than once a second."""
        if self._is_unsaved and time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
            self._save()

    def _save(self) -> None:
        self._is_unsaved = False
        self._saved = time.monotonic()
        self._document.content["seconds"] = self._spent_before + self._saved - self._start
        self._document.save()
        log = self._folder / LOG
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            os.truncate(log, 0)
