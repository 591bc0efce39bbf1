"""Requests to stop a run: signals, and the maintenance notices of Cloud TPU hosts."""

import contextlib
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

from flowhn_jax.utils.periodic import repeating

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"
_NOTICES = {"maintenance-event": "NONE", "preempted": "FALSE"}  # and their values without a notice
_SECONDS_BETWEEN_POLLS = 5


class StopRequest:
    """Records SIGINT, SIGTERM or a notice, so that a run can stop between two steps.

    A context manager, for the main thread. The second signal ends the process at once.
    """

    def __init__(self):
        self.reason: str | None = None  # None: no request
        self._previous: dict[int, Any] = {}
        self._interrupts = False
        self._has_signal = False

    def listen(self) -> None:
        """Record signals from now on; call it again if a library may have replaced the handlers."""
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
        """Ignore signals from now on: the process is about to exit, and its status is known.

        While Python exits it would restore the default handlers, and die of a signal.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def is_requested(self) -> bool:
        """Return whether this process was asked to stop."""
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Record a request to stop."""
        self.reason = self.reason or reason
        # Not with print, whose lock the interrupted code may hold.
        hint = "; another signal ends the process at once" if self._has_signal else ""
        text = f"\n{reason}: stopping{hint}\n"
        if sys.__stderr__ is not None:
            os.write(sys.__stderr__.fileno(), text.encode())

    def _receive(self, number: int, _: Any) -> None:
        if self._has_signal:  # a notice does not count: its host sends a signal soon after it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._has_signal = True
        self.request(signal.Signals(number).name)
        if self._interrupts:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise KeyboardInterrupt on a signal within the context.

        This is for work that may end anywhere, because its result is either complete or absent.
        """
        self._interrupts = True
        try:
            if self.reason is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    @contextlib.contextmanager
    def watching_notices(self, url: str = METADATA) -> Iterator[None]:
        """Treat notices of the host's metadata server as requests to stop.

        Cloud TPU announces maintenance and preemption there
        (cloud.google.com/compute/docs/metadata/getting-live-migration-notice).
        """

        def poll() -> bool:
            notice = _notice(url)
            if notice is not None:
                self.request(notice)
            return notice is None

        with repeating(poll, _SECONDS_BETWEEN_POLLS, "maintenance notices"):
            yield


def _notice(url: str) -> str | None:
    """Return the notice that the metadata server has by now, if any."""
    for name, default in _NOTICES.items():
        request = urllib.request.Request(url + name, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS_BETWEEN_POLLS) as answer:
                found = answer.read(1000).decode(errors="replace").strip()
        except OSError:  # the server may answer the next time
            continue
        if found != default:
            return f"the host's {name} is {found}"
    return None
