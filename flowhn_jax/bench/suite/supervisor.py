"""The process that gives the parts their time, keeps their rows, and outlives its workers."""

import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite.document import Document
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.bench.suite.worker import Request, serve

LOG = "suite.log"

_GPU_MEMORY = "XLA_PYTHON_CLIENT_"  # variables that do nothing on a CPU

_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_SAVES = 1.0
_MAX_LOG_BYTES = 2**23  # a longer log is truncated: a library may repeat a warning endlessly
_MIN_SECONDS = 3.0  # below which no part is started

_Message = tuple[Any, ...]


class Stop(Exception):
    """The suite must stop: a signal has arrived, or its time is over."""


class _Kind(NamedTuple):
    """The settings of a worker that cannot change after its process has started."""

    environment: tuple[tuple[str, str], ...]
    prepares_memory: bool


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self, kind: _Kind, log: pathlib.Path, cache: pathlib.Path, describes: str):
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        environment, prepares_memory = dict(kind.environment), kind.prepares_memory
        arguments = theirs, environment, str(log), str(cache), describes, prepares_memory
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
        on_time: Callable[[float], None] = lambda seconds: None,
    ):
        """Prepare a run; the time starts now.

        Args:
          parts: the most valuable first.
          document: the document of the folder; the rows are added to it.
          folder: for suite.log; the compilation cache is in its parent.
          seconds: maximum time of the run.
          describes: module whose `describe()` identifies the machine.
          log: prints a line of progress.
          on_part: called after each part, when its rows are saved.
          on_time: called several times per second with the seconds since the start.
        """
        self._parts, self._document, self._folder = parts, document, folder
        self._describes, self._log = describes, log
        self._on_part, self._on_time = on_part, on_time
        self._worker: _Worker | None = None
        self._waiting: dict[_Kind, _Worker] = {}  # on a CPU, for later parts
        self._start = time.monotonic()
        self._end = self._start + seconds
        self._spent_before: float = document.content["seconds"]
        self._saved, self._is_unsaved = 0.0, False
        self.stopped_by: str | None = None  # the signal's name

    def run(self) -> None:
        """Run the parts until nothing is missing, the time is over or a signal arrives.

        Parts run in their order, each for its share of the time; interrupted ones are continued
        after the last one. A signal is answered within a second.

        Raises:
          ValueError: the folder has the results of another machine.
          RuntimeError: a worker cannot start, or cannot use the device.
        """
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while parts := self._startable():
                for i, part in enumerate(parts):
                    self._run_part(part, self._allotted(parts[i:]))
        except Stop:
            pass
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._end_worker()
            for worker in self._waiting.values():
                worker.kill()
            self._save()

    def _on_signal(self, number: int, _: Any) -> None:
        self.stopped_by = signal.Signals(number).name

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _startable(self) -> list[Part]:
        """Return the unfinished parts that are worth starting in the remaining time."""
        parts = [part for part in self._parts if self._is_unfinished(part)]
        if self._left() < _MIN_SECONDS:
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

    def _allotted(self, parts: Sequence[Part]) -> float:
        """Return the seconds of the first of the remaining parts."""
        share = parts[0].share / sum(part.share for part in parts)
        return max(share * self._left(), parts[0].least)

    def _run_part(self, part: Part, seconds: float) -> None:
        """Run a part for its time; after its worker died, key by key, to find the cause."""
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
            self._log("  time limit reached; continued after the other parts")
            self._end_worker()
        finally:
            record["seconds"] += time.monotonic() - start
            self._save()
            self._on_part()

    def _request(self, part: Part, keys: list[str] | None, end: float) -> str | None:
        """Run keys of a part; return how the worker died, None if it did not.

        Raises:
          TimeoutError: the part's time is over.
          Stop: the suite's time is over, or a signal has arrived.
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
        """Process the worker's messages until it has completed the request."""
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
            else:  # 'done'; a key without a row is not requested again
                missing = self._document.missing(part.name) or []
                for key in missing if keys is None else set(keys) & set(missing):
                    self._add(part, {"key": key, "failed": "the part gave no result"})
                return

    def _worker_for(self, part: Part, end: float) -> _Worker:
        """Return a live worker with the settings of the part: the current, a waiting or a new one.

        The settings depend on the platform, which is known once the first worker has started.
        """
        while (
            (worker := self._worker) is None
            or worker.kind != self._kind(part)
            or not worker.process.is_alive()
        ):
            self._put_aside()
            kind = self._kind(part)
            self._worker = self._waiting.pop(kind, None)
            if self._worker is None:
                self._start_worker(kind, end)
        return worker

    def _put_aside(self) -> None:
        """Let the current worker wait if it is on a CPU, which idle workers do not occupy."""
        worker = self._worker
        if worker is not None and self._is_on_cpu() and worker.process.is_alive():
            self._waiting[worker.kind] = worker
            self._worker = None
        self._end_worker()

    def _is_on_cpu(self) -> bool:
        return (self._document.content["machine"] or {}).get("platform") == "cpu"

    def _kind(self, part: Part) -> _Kind:
        if not self._is_on_cpu():
            return _Kind(tuple(part.environment.items()), prepares_memory=False)
        return _Kind(_without_gpu_memory(part.environment.items()), prepares_memory=part.is_timed)

    def _start_worker(self, kind: _Kind, end: float) -> None:
        """Start a worker and record the machine that it reports."""
        log, cache = self._folder / LOG, self._folder.absolute().parent / "compilation_cache"
        self._worker = worker = _Worker(kind, log, cache, self._describes)
        try:
            _, machine = self._receive(worker, end)
        except (EOFError, ConnectionError):
            raise RuntimeError(
                f"The worker cannot use the device: {self._death()}; its messages are in "
                f"{str(log)!r}."
            ) from None
        self._document.check_machine(machine)
        if self._is_on_cpu():
            worker.kind = kind._replace(environment=_without_gpu_memory(kind.environment))

    def _receive(self, worker: _Worker, end: float) -> _Message:
        while True:
            if self.stopped_by is not None or self._left() <= 0:
                raise Stop
            if time.monotonic() >= end:
                raise TimeoutError
            if worker.connection.poll(_POLL_SECONDS):
                return worker.connection.recv()
            self._save_soon()
            self._on_time(time.monotonic() - self._start)
            # A process that the worker started may keep its end of the connection open.
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
        """Return how the current worker died, and remove it."""
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
        """Save new rows, but not more than once a second."""
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


def _without_gpu_memory(environment: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the variables that matter on a CPU, where parts can then share a worker."""
    return tuple(item for item in environment if not item[0].startswith(_GPU_MEMORY))
