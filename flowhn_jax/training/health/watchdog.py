"""Reports where a process is when a run makes no progress."""

import faulthandler
import os
import socket
import sys
import threading
import time
from typing import Any

import jax


class Watchdog:
    """Prints the stacks of all threads if no step ends for a long time; a context manager.

    Each process of a run has its own. It prints again after each further period, and does not stop
    the run, which may just be slow.
    """

    def __init__(self, minutes: float):
        """Report when there is no progress for this many minutes."""
        self._limit = 60 * minutes
        self._last = time.monotonic()
        self._what = "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def progress(self, what: str) -> None:
        """Record that something has ended, and that `what` begins."""
        self._last = time.monotonic()
        self._what = what

    def _watch(self) -> None:
        reported = 0
        while not self._ended.wait(min(self._limit / 10, 10)):
            periods = int((time.monotonic() - self._last) / self._limit)
            if periods > reported:
                self._report(periods * self._limit / 60)
            reported = periods

    def _report(self, minutes: float) -> None:
        print(
            f"watchdog: no progress for {minutes:g} minutes since {self._what!r} began, in process "
            f"{jax.process_index()} (pid {os.getpid()} on {socket.gethostname()}); the stacks of "
            "its threads:",
            file=sys.stderr,
            flush=True,
        )
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
