"""Processes that work on independent tasks."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

_shared: Any = None  # in a worker: what `Workers` was made with


class WorkerKilledError(OSError):
    """A worker process was killed; the other tasks' results are kept."""


class Workers(contextlib.ExitStack, Generic[S]):
    """A number of processes; with one, the calling process does the work."""

    def __init__(self, count: int, shared: S):
        """Make the workers; the processes start with the first task.

        Args:
          count: the number of processes that work.
          shared: what all tasks need and is slow to copy; each worker receives it once.
        """
        super().__init__()
        self._count = count
        self._shared = shared
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if count > 1:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), _start, (shared,)
            )
            self.callback(self._pool.shutdown, cancel_futures=True)

    def map(
        self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Yield the function's result for each task, in order; tasks are read a few ahead.

        Args:
          function: of a module, so that workers can import it; its first argument is `shared`.
          tasks: its other arguments.

        Raises:
          WorkerKilledError: a worker was killed.
          Exception: an error of the function.
        """
        if self._pool is None:
            for task in tasks:
                yield function(self._shared, *task)
            return
        waiting: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_call, function, task))
                if len(waiting) > 2 * self._count:  # bounds the memory; every worker stays busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise WorkerKilledError(
                f"One of the {self._count} worker processes was killed, possibly because memory "
                "ran out. What the others have finished is kept; type the same command to "
                "continue, with fewer --workers."
            ) from error


def _call(function: Callable[..., T], task: tuple[Any, ...]) -> T:
    return function(_shared, *task)


def _start(shared: Any) -> None:
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a worker
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
