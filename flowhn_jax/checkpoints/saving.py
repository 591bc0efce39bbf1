"""A save in the background, which succeeds or fails for all processes of a run together.

Orbax alone waits for minutes if a process cannot write its part and never reaches a barrier.
"""

import asyncio
import dataclasses
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src import asyncio_utils
from orbax.checkpoint._src.futures import signaling_client
from orbax.checkpoint._src.serialization import tensorstore_utils

from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.parallel.distributed import FailedElsewhereError, Meeting

_LATER, _OTHER = "later", "other"  # why a save failed, as the other processes learn it
_TIMEOUT = 1200.0  # seconds, as Orbax's own limit


class Save:
    """One save of a checkpoint."""

    def __init__(self, number: int):
        """Prepare a save; `number` counts the saves of the process."""
        self._meeting = Meeting(f"save/{number}")
        self._caller = threading.get_ident()
        if number > 1:  # save number - 2 has ended in all processes
            Meeting(f"save/{number - 2}").forget()
        self._error: BaseException | None = None  # in this process
        self._thread: threading.Thread | None = None
        self._signals = signaling_client.get_signaling_client()
        if jax.process_count() > 1:
            self._signals.wait_at_barrier = self._wait_at_barrier
            self._signals.blocking_key_value_get = self._meeting.wait_for_value

    def start(
        self, work: Callable[[], None], afterwards: Callable[[], None] = lambda: None
    ) -> None:
        """Do this process's part of the save in a thread, and what follows in all processes."""

        def finish() -> None:
            try:
                work()
                self._meeting.wait("end", _TIMEOUT)  # until the others have done theirs
                afterwards()
            except BaseException as error:
                self._error = error
                self._fail(error)

        self._thread = threading.Thread(target=finish, name="checkpoint", daemon=True)
        self._thread.start()

    def _fail(self, error: BaseException) -> None:
        # Orbax's threads end with coroutines that they have not run.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self._meeting.fail(_LATER if disk.refuses_writes(error) else _OTHER)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes; raise if one has failed.

        Orbax's threads also call it while they raise an error, and then it does not wait.
        """
        error = None if threading.get_ident() == self._caller else sys.exc_info()[1]
        if error is not None:
            self._fail(error)
            return
        self._meeting.wait(key, timeout_ms / 1000)

    def _wait_at_barrier(self, key: str, *, timeout_secs: int, process_ids: Any = None) -> None:
        self._meeting.wait(key, timeout_secs)

    def error(self) -> BaseException | None:
        """Return this process's error so far, unless a later save may succeed."""
        return None if self._error is None or self.may_succeed_later() else self._error

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the save has ended in all processes, or for at most `seconds`."""
        assert self._thread is not None
        self._thread.join(seconds)
        for name in ("wait_at_barrier", "blocking_key_value_get"):
            vars(self._signals).pop(name, None)

    def failure(self) -> BaseException | None:
        """Return why the save failed, FailedElsewhereError if in another process; None if not."""
        if self._error is None and self._meeting.failure() is None:
            return None
        return self._error or FailedElsewhereError()

    def may_succeed_later(self) -> bool:
        """Return whether the save failed because a disk is full or a bucket refuses requests.

        All processes get the same answer.
        """
        return self._meeting.failure() == _LATER


def set_barrier(options: ocp.options.AsyncOptions, barrier: Callable[..., None]) -> None:
    """Set the barrier of Orbax's background threads, which only its inner options have."""
    inner = options.v0()
    options.v0 = lambda: dataclasses.replace(inner, barrier_sync_fn=barrier)


def _run_to_the_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine, and all tasks that it has begun, in a new event loop.

    Orbax would close the loop when the first array cannot be written, and TensorStore then prints a
    traceback for each of the others.
    """
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coroutine)
    finally:
        if tasks := asyncio.all_tasks(loop):
            loop.run_until_complete(asyncio.wait(tasks))
        asyncio.set_event_loop(None)
        loop.close()


asyncio_utils._run_sync_via_new_loop = _run_to_the_end
# Retries of a request to a bucket; TensorStore's default is to try for a quarter of an hour.
for _context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    _context["gcs_request_retries"] = {  # pyright: ignore[reportArgumentType]
        "max_retries": 6,
        "initial_delay": "500ms",
        "max_delay": "16s",
    }
