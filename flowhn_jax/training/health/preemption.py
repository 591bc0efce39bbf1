"""What asks a run to stop: signals, and a Cloud TPU's notice of maintenance; agreed by all."""

import contextlib
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
_NOTICES = {"maintenance-event": "NONE", "preempted": "FALSE"}  # and what they say in quiet times
_SECONDS_BETWEEN_LOOKS = 5


class StopRequest:
    """Notes SIGINT, SIGTERM or a notice, so that a run can stop between steps.

    Use as a context manager, in the main thread. The second signal ends the process at once.
    """

    def __init__(self):
        self.reason: str | None = None  # None: nothing asks this process to stop
        self._previous: dict[int, Any] = {}
        self._breaks_off = False

    def listen(self) -> None:
        """From now on signals are noted; again after anything else may have taken them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._receive)
            self._previous.setdefault(number, previous)

    def __enter__(self) -> "StopRequest":
        self.listen()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """From now on signals mean nothing: the process is at its end, and its status is known.

        Python itself would go back to dying of them.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def is_asked(self) -> bool:
        """Whether something asks this process to stop."""
        return self.reason is not None

    def note(self, reason: str) -> None:
        """From now on something asks this process to stop."""
        self.reason = self.reason or reason
        # Not by print, whose lock the interrupted code may hold.
        text = f"\n{reason}: stopping with a checkpoint; another signal ends the run at once\n"
        os.write(sys.__stderr__.fileno(), text.encode())

    def _receive(self, number: int, _: Any) -> None:
        if self.reason is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.note(signal.Signals(number).name)
        if self._breaks_off:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """A signal raises KeyboardInterrupt within: for work that is complete or absent."""
        self._breaks_off = True
        try:
            if self.reason is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._breaks_off = False

    @contextlib.contextmanager
    def heeding_notices(self, url: str = METADATA) -> Iterator[None]:
        """Takes notices of the host's end from the metadata server as signals.

        Cloud TPU announces maintenance and preemption there
        (cloud.google.com/compute/docs/metadata/getting-live-migration-notice).
        """
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                if (notice := _notice(url)) is not None:
                    self.note(notice)
                    return

        thread = threading.Thread(target=look, name="maintenance notices", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()


def _notice(url: str) -> str | None:
    for name, quiet in _NOTICES.items():
        request = urllib.request.Request(url + name, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS_BETWEEN_LOOKS) as answer:
                found = answer.read(1000).decode(errors="replace").strip()
        except OSError:  # the next look may find the server again
            continue
        if found != quiet:
            return f"the host's {name} is {found}"
    return None
