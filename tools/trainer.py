"""train.py as a child process that a test can watch and harm."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from flowhn_jax.storage import Place
from flowhn_jax.utils.sources import ROOT

_ROW = re.compile(r"step +(\d+)/(\d+) ")
_RESUMING = re.compile(r"resuming .* at step (\d+)")
_POLL_SECONDS = 0.002


class Trainer:
    """One start of a run, as a context manager; on exit the process has ended."""

    def __init__(
        self,
        flags: Sequence[str],
        cache: pathlib.Path,
        variables: Mapping[str, str] = types.MappingProxyType({}),
    ):
        """Start train.py.

        Args:
          flags: the flags of the command.
          cache: folder that keeps compiled programs for later starts.
          variables: the variables of its environment, in addition to this process's.
        """
        environment = os.environ | {
            **variables,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment.pop("XLA_FLAGS", None)  # one device
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C must only reach the soak
        )
        self._started = time.monotonic()
        self._lines: list[str] = []
        self.first_step: int | None = None  # the step at which it began or resumed
        self.step: int | None = None  # of the last logged row
        self.is_last_step = False
        self.seconds_to_first_row: float | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.status is None:
            self.send(signal.SIGKILL)
        self.wait(None)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            if found := _RESUMING.match(line):
                self.first_step = self.step = int(found[1])
            elif found := _ROW.match(line):
                self.step = int(found[1])
                self.is_last_step = found[1] == found[2]
                if self.first_step is None:
                    self.first_step = 0
                if self.seconds_to_first_row is None:
                    self.seconds_to_first_row = self.age

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    @property
    def age(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started

    @property
    def status(self) -> int | None:
        """Return the exit status (-N if signal N killed it), or None while it runs."""
        return self._process.poll()

    @property
    def lines(self) -> list[str]:
        """Return the lines printed so far."""
        return list(self._lines)

    @property
    def steps_done(self) -> int:
        """Return the steps from this start to the last logged row."""
        return 0 if self.step is None else self.step - self.first_step

    def handles(self, number: int) -> bool:
        """Return whether the process has installed a handler for the signal."""
        try:
            text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return False
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", text, re.MULTILINE)
        return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)

    def send(self, number: int) -> None:
        """Send a signal; does nothing if the process has ended."""
        self._process.send_signal(number)

    def wait(self, seconds: float | None) -> int | None:
        """Return the exit status after reading all output, or None if it runs after `seconds`."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join()
        return status

    def wait_for_step(self, seconds: float) -> bool:
        """Wait up to `seconds` for the first step; return whether the process trains."""
        end = time.monotonic() + seconds
        while self.step is None and self.status is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return self.step is not None and self.status is None

    def wait_for_new_name(self, folder: Place, seconds: float) -> None:
        """Wait until a name appears in `folder`, the process ends, or `seconds` have passed."""
        end = time.monotonic() + seconds
        before = _names(folder)
        while self.status is None and time.monotonic() < end:
            now = _names(folder)
            if now - before:
                return
            before = now
            time.sleep(_POLL_SECONDS)


def _names(folder: Place) -> set[str]:
    return {path.name for path in folder.children()}
