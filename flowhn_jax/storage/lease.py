"""The lock of a run in a bucket: an object that its holder renews, and that expires without it."""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flowhn_jax.storage.bucket import BucketPlace
from flowhn_jax.storage.errors import StorageError
from flowhn_jax.storage.place import Place
from flowhn_jax.storage.requests import repeated
from flowhn_jax.utils.periodic import repeating

SECONDS_TO_RENEW = 20.0  # from one renewal to the next
SECONDS_TO_LIVE = 60.0  # without a renewal, after which another process may take the lock over
_SECONDS_BETWEEN_LOOKS = 2.0
_MAX_HOST = 255  # characters in a message
_TIMEOUT = 10.0  # seconds for one answer
_SECONDS_TO_TRY = 20.0  # a request, in all


class InUseError(ValueError):
    """Another process holds the lock; the message names it."""


class LockLostError(OSError):
    """Another process has taken the lock over."""


class Lock:
    """A lock that needs no renewal: a local folder's, or that of a process that writes nothing."""

    def confirm(self) -> None:
        """Raise OSError if this process may not write now."""

    def error(self) -> OSError | None:
        """Return the error if another process is known to have the lock; None otherwise."""
        return None


class Lease(Lock):
    """The object of a lock, which holds host, process id, a token and the time.

    Every write has the object's last generation as its precondition, so that two processes never
    both believe they hold it. The age of a lock is the time since the store received its last
    renewal, by this host's clock, which must be right to within some seconds.
    """

    def __init__(
        self,
        place: Place,
        log: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ):
        """Prepare the lock at `place`; `acquire` takes it.

        Args:
          place: its object.
          log: prints a line for people.
          clock: seconds since 1970.
          sleep: waits for this number of seconds.
        """
        assert isinstance(place, BucketPlace)
        self._place, self._log, self._clock, self._sleep = place, log, clock, sleep
        self._token = uuid.uuid4().hex
        self._generation = 0
        self._renewed = 0.0  # when the last renewal that succeeded was sent
        self._error: LockLostError | None = None
        self._is_released = False
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Take the lock; wait for one that is not renewed to expire.

        Raises:
          InUseError: another process holds it and has renewed it meanwhile.
        """
        first = None
        while not self._try_to_write(0):
            found = self._found()
            if found is None:  # released meanwhile
                continue
            generation, age, holder = found
            if age >= SECONDS_TO_LIVE:
                if self._try_to_write(generation):
                    self._log(f"the lock of {describe(holder)} was not renewed; taken over")
                    return
                continue
            if first is None:
                first = generation
                self._log(
                    f"{self._place} is held by {describe(holder)} and was renewed "
                    f"{max(age, 0):.0f} s ago; waiting for its next renewal, or until it is "
                    f"{SECONDS_TO_LIVE:.0f} s old"
                )
            elif generation != first:
                raise InUseError(describe(holder))
            self._sleep(_SECONDS_BETWEEN_LOOKS)

    def renew(self) -> None:
        """Renew the lock; `error` returns what is wrong if another process has it.

        A released lock stays released, also if a renewal has waited for the release.

        Raises:
          StorageError: the store does not answer; the lock may still be this process's.
        """
        with self._lock:
            if self._error is not None or self._is_released:
                return
            if self._try_to_write(self._generation):
                return
            # The object may have been removed by hand. Then nobody holds it.
            if self._found() is None and self._try_to_write(0):
                return
            found = self._found()
            holder = "another process" if found is None else describe(found[2])
            self._error = LockLostError(f"the lock {self._place} was taken over by {holder}")

    def confirm(self) -> None:
        """Renew the lock unless that was done a short while ago; raise if it is lost.

        Raises:
          LockLostError: another process has it.
          StorageError: the store does not answer.
        """
        if self._clock() - self._renewed > 1.5 * SECONDS_TO_RENEW:
            self.renew()
        if self._error is not None:
            raise self._error

    def error(self) -> LockLostError | None:
        """See Lock."""
        return self._error

    def release(self) -> None:
        """Remove the lock, unless another process has it or takes it over now."""
        from google.api_core.exceptions import PreconditionFailed

        with (
            self._lock,
            contextlib.suppress(FileNotFoundError, StorageError, PreconditionFailed),
        ):
            self._is_released = True
            found = self._found()
            if found is not None and found[2].get("token") == self._token:
                self._request(
                    "removing",
                    lambda blob: blob.delete(
                        if_generation_match=found[0], timeout=_TIMEOUT, retry=None
                    ),
                )

    def _try_to_write(self, generation: int) -> bool:
        """Write the object if its generation is this one (0: it is absent); return success."""
        from google.api_core.exceptions import PreconditionFailed

        now = self._clock()
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": now,
            "token": self._token,
        }

        def write(blob: Any) -> int:
            blob.upload_from_string(
                json.dumps(holder),
                "application/json",
                if_generation_match=generation,
                timeout=_TIMEOUT,
                retry=None,
            )
            return blob.generation

        try:
            self._generation = self._request("writing", write)
        except (PreconditionFailed, FileNotFoundError) as error:
            if generation == 0 and isinstance(error, FileNotFoundError):  # the bucket is absent
                raise
            # The answer to an earlier try may have been lost.
            found = self._found()
            if found is None or found[2].get("token") != self._token:
                return False
            self._generation = found[0]
        self._renewed = now
        return True

    def _found(self) -> tuple[int, float, dict[str, Any]] | None:
        """Return the object's generation, its age in seconds and its content; None: absent."""

        def load(blob: Any) -> tuple[int, float, bytes]:
            blob.reload(timeout=_TIMEOUT, retry=None)
            updated: datetime.datetime = blob.updated
            content = blob.download_as_bytes(timeout=_TIMEOUT, retry=None)
            return blob.generation, self._clock() - updated.timestamp(), content

        try:
            generation, age, content = self._request("reading", load)
        except FileNotFoundError:
            return None
        try:
            holder = json.loads(content)
        except ValueError:
            holder = None
        return generation, age, holder if isinstance(holder, dict) else {}

    def _request(self, verb: str, request: Callable[[Any], Any]) -> Any:
        return repeated(
            f"{verb} {self._place}", lambda: request(self._place.blob()), seconds=_SECONDS_TO_TRY
        )


def describe(holder: Any) -> str:
    """Return the process that the JSON value of a lock names, in words."""
    try:
        return f"process {int(holder['pid'])} on host {str(holder['host'])[:_MAX_HOST]}"
    except (ValueError, KeyError, TypeError, OverflowError):
        return "another process"


@contextlib.contextmanager
def held(place: Place, log: Callable[[str], None]) -> Iterator[Lease]:
    """Hold a lock in the context and renew it in the background.

    Raises:
      InUseError: another process holds it.
    """
    lease = Lease(place, log)
    lease.acquire()

    def renew() -> bool:
        is_held = lease.error() is None
        if is_held:
            with contextlib.suppress(StorageError):  # tried again at the next renewal
                lease.renew()
        return is_held

    try:
        with repeating(renew, SECONDS_TO_RENEW, "lock"):
            yield lease
    finally:
        lease.release()
