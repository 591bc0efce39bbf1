"""When the processes of a run stop: all after the same step, whichever of them has a reason."""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.distributed import AnyProcessBefore, FailedElsewhere, any_process
from flowhn_jax.training.health.preemption import StopRequest


class StopAgreement:
    """Agreement of all processes to stop after the same step.

    A reason is a request to stop, or an error that one process alone has, such as one of its data
    or its disk. Such an error is postponed: all processes stop after the same step and save a
    checkpoint, and then the error is raised. To hear of it in time, each process reads its batches
    as many steps ahead as the others need to learn of an error.
    """

    def __init__(
        self, mesh: Mesh, stop: StopRequest, batches: TrainBatches, checkpoints: Checkpoints
    ):
        self._stop = stop
        self._batches = batches
        self._checkpoints = checkpoints
        self._any_process_before = AnyProcessBefore(mesh)
        self._error: Exception | None = None

    @contextlib.contextmanager
    def postponing_errors(self) -> Iterator[None]:
        """Keep an error of this process; `should_stop` answers True soon after."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def should_stop(self, steps_left: int, validation: Lookahead[Batch] | None = None) -> bool:
        """Return whether some process has a reason to stop; the same answer in all.

        All processes must call it at the same places. In a run of several processes the answer is
        that of the call before, so that no device waits for it.

        Args:
          steps_left: steps that still need a batch.
          validation: the batches of the validation that is under way.
        """
        ahead = 1 + self._any_process_before.delay
        errors = [self._error, self._checkpoints.error()]
        errors.append(self._batches.error_within(min(ahead, steps_left)))
        if validation is not None:
            errors.append(validation.error_within(ahead))
        self._error = next((error for error in errors if error is not None), None)
        return self._any_process_before(self._stop.is_requested() or self._error is not None)

    def has_error(self) -> bool:
        """Return whether some process has a postponed error; all must call it."""
        return any_process(self._error is not None)

    def raise_error(self, note: str) -> None:
        """Raise the postponed error, if some process has one, with a note; all must call it.

        Raises:
          Exception: the error of this process.
          FailedElsewhere: another process has an error.
        """
        if self.has_error():
            error = self._error or FailedElsewhere()
            error.add_note(note)
            raise error
