"""Says where a process is when a run stands still."""

import faulthandler
import os
import socket
import sys
import threading
import time
from typing import Any

import jax


class Watchdog:
    """Prints the stacks of all threads when no step ended for long; a context manager.

    Each process of a run has its own. It prints again each time as long has passed, and ends
    nothing: what is slow may still come.
    """

    def __init__(self, minutes: float):
        """`minutes` between ends of steps are too many."""
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
        """Something has just ended, and `what` begins."""
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
            f"watchdog: nothing ended for {minutes:g} minutes since {self._what!r} began, in "
            f"process {jax.process_index()} (pid {os.getpid()} on {socket.gethostname()}); "
            "the stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
