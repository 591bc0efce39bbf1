"""Agreement among the processes of a run to stop after the same step."""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.distributed import AnyProcessBefore, FailedElsewhereError, any_process
from flowhn_jax.storage import Lock
from flowhn_jax.training.health.preemption import StopRequest


class StopAgreement:
    """Stops all processes after the same step if any of them has a reason.

    A reason is a request to stop, or an error in a single process, such as unreadable data or a
    full disk. Such an error is postponed: all processes stop after the same step and save a
    checkpoint, and only then is it raised. The other processes learn of an error one call late, so
    each process reads its batches that far ahead: all can still train up to the bad batch.
    """

    def __init__(
        self,
        mesh: Mesh,
        stop: StopRequest,
        batches: TrainBatches,
        checkpoints: Checkpoints,
        lock: Lock,
    ):
        self._stop = stop
        self._batches = batches
        self._checkpoints = checkpoints
        self._lock = lock
        self._any_process_before = AnyProcessBefore(mesh)
        self._error: Exception | None = None

    @contextlib.contextmanager
    def postponing_errors(self) -> Iterator[None]:
        """Postpone an error raised in the context; `should_stop` soon returns True for it."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def should_stop(self, steps_left: int, validation: Lookahead[Batch] | None = None) -> bool:
        """Return whether any process has a reason to stop, the same value in all processes.

        All processes must call it at the same places. With several processes, the value is that of
        the previous call, so that no device waits for it.

        Args:
          steps_left: steps that still need a batch.
          validation: the batches of the current validation, if any.
        """
        ahead = 1 + self._any_process_before.delay
        errors = [self._error, self._checkpoints.error(), self._lock.error()]
        errors.append(self._batches.error_within(min(ahead, steps_left)))
        if validation is not None:
            errors.append(validation.error_within(ahead))
        self._error = next((error for error in errors if error is not None), None)
        return self._any_process_before(self._stop.is_requested() or self._error is not None)

    def has_error(self) -> bool:
        """Return whether any process has a postponed error; all processes must call it."""
        return any_process(self._error is not None)

    def raise_error(self, note: str) -> None:
        """Raise the postponed error, with a note, if any process has one; all must call it.

        Raises:
          Exception: the error of this process.
          FailedElsewhereError: another process has an error.
        """
        if self.has_error():
            error = self._error or FailedElsewhereError()
            error.add_note(note)
            raise error
