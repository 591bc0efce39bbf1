"""The steps of a run: what `loop.fit` has set up, it carries to the end."""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from flowhn_jax import flops
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import TrainState, abstract_state
from flowhn_jax.config import Config
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.evaluation.perplexity import make_eval_step, validate, validation
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.compilation import compile_unless
from flowhn_jax.parallel.distributed import (
    AnyProcessBefore,
    FailedElsewhere,
    any_process,
    broadcast_from_first,
)
from flowhn_jax.parallel.mesh import shard_batch
from flowhn_jax.report.table import to_json
from flowhn_jax.training.health import bad_steps
from flowhn_jax.training.health.monitor import Monitor, Progress, TooManySkipped
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.training.health.watchdog import Watchdog
from flowhn_jax.training.metrics import MetricsWriter, Row
from flowhn_jax.training.step import Metrics, abstract_batch, make_train_step
from kernels import backends

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class _Clock:
    """Times the steps between two rows of metrics."""

    def __init__(self, config: Config):
        batch, context = config.train.batch_size, config.model.context
        self._tokens = batch * context  # these three are of a step
        self._flops = batch * flops.train_flops(config.model, context)
        self._dense_flops = batch * flops.train_flops(config.model, context, causal=False)
        self.restart()

    def restart(self) -> None:
        """Steps are counted from here on."""
        self._steps = 0
        self._start = time.perf_counter()

    def count_step(self) -> None:
        """One more step was dispatched."""
        self._steps += 1

    def read(self, step: int, mesh: Mesh) -> Row:
        """Speed since `restart`; call it when the device is done with all steps."""
        seconds = (time.perf_counter() - self._start) / self._steps
        devices = mesh.size
        per_device = self._flops / seconds / devices
        dense_per_device = self._dense_flops / seconds / devices
        device = mesh.devices.flat[0]
        return {
            "tokens": step * self._tokens,
            "tokens_per_second": self._tokens / seconds,
            "tokens_per_second_per_device": self._tokens / seconds / devices,
            "tflops_per_second_per_device": per_device / 1e12,
            "mfu": flops.utilisation(per_device, device),
            "mfu_palm": flops.utilisation(dense_per_device, device),
            "step_seconds": seconds,
            "time": time.time(),
        }


@dataclasses.dataclass
class Run:
    """A run whose parts are ready.

    An error that one process alone may have, as of its data or its disk, ends the run like a
    request to stop: all processes stop after the same step and save; then the error is raised. For
    that each process reads its batches so far ahead that the others hear of an error in time.
    """

    config: Config
    workdir: str
    mesh: Mesh
    prepared: PreparedSet
    batches: TrainBatches
    checkpoints: Checkpoints
    writer: MetricsWriter
    watchdog: Watchdog
    stop: StopRequest

    def __post_init__(self):
        self._eval_step = make_eval_step(self.config)
        self._any_asked = AnyProcessBefore(self.mesh)
        self._clock = _Clock(self.config)
        self._error: Exception | None = None  # to be raised when all have stopped
        self._validation: Lookahead[Batch] | None = None  # batches of the one that goes on

    def go(self, state: TrainState, progress: Progress) -> bool:
        """Trains to the last step; False where a request to stop came before it.

        Raises:
          ValueError: too many steps in a row were skipped.
          OSError: the disk was too full for the last checkpoint.
          FailedElsewhere: another process has an error.
        """
        self._begin(state, progress)
        steps = self.config.train.steps
        if progress.row is not None:
            # An earlier start may have come to write it.
            self.writer.drop_rows_after(self._step_done - 1)
            if not self._validate(progress.row):
                return self._end()
        if self._step_done >= steps:  # the row of the last validation was missing
            return self._end()
        self._is_to_stop()
        if self._is_to_stop() and self._is_any_error():  # in the first batches
            return self._end()
        function = self._compile()
        if function is None:
            self._save()
            return self._end()
        goes_on = True
        while goes_on and self._step_done < steps:
            try:
                goes_on = self._step(function)
            except TooManySkipped as skipped:
                self._rewind(skipped)
            except Exception as error:  # the other processes are at another place
                error.add_note(self._newest_checkpoint())
                raise
        return self._end()

    def _begin(self, state: TrainState, progress: Progress) -> None:
        """From now on the run is at this state."""
        self._state = state
        self._step_done = int(state.step)
        self._progress = progress
        self._monitor = Monitor(progress, self.config.train.max_skipped, self._say)
        self._unread: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._clock.restart()

    def _compile(self) -> StepFunction | None:
        """The train step; None where some process was asked to stop before there was one."""
        self.watchdog.progress("compiling")
        function = make_train_step(self.config, self.mesh)
        if self.config.train.debug_nans:
            return function  # only jit itself finds the operation at fault
        start = time.perf_counter()
        with backends.record() as chosen:
            lowered = function.lower(self._state, abstract_batch(self.config, self.mesh))
        compiled = compile_unless(self.stop.is_asked, lowered)
        if compiled is not None:
            seconds = time.perf_counter() - start
            found = backends.describe(chosen)
            self.writer.say(f"compiled the train step in {seconds:.1f} s; {found}")
        self._clock.restart()
        return compiled

    def _step(self, function: StepFunction) -> bool:
        """One step, with all that is due behind it; False where the run is to stop there."""
        train = self.config.train
        step = self._step_done + 1
        batch = shard_batch(next(self.batches), self.mesh)
        self._state, metrics = function(self._state, batch)
        self._step_done = step
        self._unread.append((step, metrics))
        self._clock.count_step()
        with self._postponing_errors():
            self.writer.advance()

        last = step == train.steps
        evaluates = step % train.eval_every == 0 or last
        logs = step % train.log_every == 0 or evaluates
        stops = self._is_to_stop()
        saves = step % train.checkpoint_every == 0 or last or stops
        values = self._read(everything=logs or saves)
        loss = None
        if logs:
            row = {"step": step, **values, "spikes": self._progress.spikes}
            row |= self._clock.read(step, self.mesh)
            if not evaluates:
                self._write(row)
            elif stops or not self._validate(row):
                stops = saves = True
                self._progress.row = row
            else:
                loss = row["validation_loss"]
            self._clock.restart()
        if saves:
            self._save(loss)
            self._clock.restart()
        return not stops

    def _is_to_stop(self) -> bool:
        """Whether some process is to stop, or has an error; all call it at the same places."""
        ahead = 1 + self._any_asked.delay
        errors = [self._error, self.checkpoints.error()]
        errors.append(self.batches.error_within(min(ahead, self._steps_left)))
        if self._validation is not None:
            errors.append(self._validation.error_within(ahead))
        self._error = next((error for error in errors if error is not None), None)
        return self._any_asked(self.stop.is_asked() or self._error is not None)

    @property
    def _steps_left(self) -> int:
        return max(0, self.config.train.steps - self._step_done)

    def _is_any_error(self) -> bool:
        """Whether some process has an error that waits to be raised."""
        return any_process(self._error is not None)

    @contextlib.contextmanager
    def _postponing_errors(self) -> Iterator[None]:
        """Keep an error of what this process does alone; the run stops for it at the next steps."""
        try:
            yield
        except Exception as error:
            self._error = self._error or error

    def _write(self, row: Row) -> None:
        with self._postponing_errors():
            self.writer.write(row)

    def _say(self, text: str) -> None:
        with self._postponing_errors():
            self.writer.say(text)

    def _read(self, everything: bool) -> dict[str, float]:
        """Shows the steps' metrics to the monitor; returns those of the last one that was read.

        The newest step's are left to the next call, so that the device has work meanwhile, unless
        they are asked for or the step before was skipped.
        """
        values = {}
        while len(self._unread) > (0 if everything or self._monitor.is_wary else 1):
            step, metrics = self._unread.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            self.watchdog.progress(f"the step after {step}")
            self._monitor.observe(step, values)
        values.pop("skipped_in_row", None)
        return values

    def _validate(self, row: Row) -> bool:
        """Adds the state's quality to the row and logs it; False where the run is to stop."""

        def validating() -> bool:
            self.watchdog.progress("validating")
            return self._is_to_stop()

        windows = self.config.train.eval_windows or None
        self._validation = Lookahead(validation(self.config, self.mesh, self.prepared, windows))
        try:
            validating()  # of the first batches; all know it at the next call
            quality = None
            if not validating():
                quality = validate(
                    self.config,
                    self.mesh,
                    self._eval_step,
                    self._state.params,
                    self.prepared,
                    windows,
                    stops=validating,
                    batches=self._validation,
                )
        finally:
            self._validation = None
        if quality is None:
            return False
        row["validation_loss"] = quality.nll
        row["validation_bits_per_byte"] = quality.bits_per_byte
        self._progress.row = None
        self._write(row)
        return True

    def _save(self, validation_loss: float | None = None) -> None:
        """Begins a checkpoint where the disk has room for it."""
        self.watchdog.progress("saving")
        with self._postponing_errors():  # of the one before, in all processes
            self.checkpoints.wait()
        # A checkpoint stands for all rows up to it.
        if self.checkpoints.fits(self._state) and self._has_written_rows():
            progress = json.loads(to_json(dataclasses.asdict(self._progress)))
            self.checkpoints.save(self._state, self.batches, progress, validation_loss)

    def _has_written_rows(self) -> bool:
        are_written = False
        with self._postponing_errors():
            are_written = self.writer.flush()
        return broadcast_from_first(are_written)

    def _newest_checkpoint(self) -> str:
        newest = self.checkpoints.latest_step
        if newest is None:
            return f"the run ends at step {self._step_done}; there is no checkpoint of it"
        return (
            f"the run ends at step {self._step_done}; its newest checkpoint is that of step "
            f"{newest}, from where the same command continues"
        )

    def _end(self) -> bool:
        """Waits for the last checkpoint; whether all steps are done.

        Raises:
          Exception: that of this process for which the run stopped, with the newest checkpoint.
          FailedElsewhere: it stopped for that of another process.
          OSError: the last checkpoint did not fit on the disk.
        """
        with self._postponing_errors():
            self.checkpoints.wait()
        if self._is_any_error():
            error = self._error or FailedElsewhere()
            error.add_note(self._newest_checkpoint())
            raise error
        step, newest = self._step_done, self.checkpoints.latest_step
        if newest != step:
            raise OSError(
                f"the run ends at step {step} without a checkpoint: {self.checkpoints.shortage()}, "
                "from where the same command goes on."
            )
        done = step == self.config.train.steps and self._progress.row is None
        if not done:
            reason = self.stop.reason or "another process"
            self.writer.say(
                f"stopped by {reason} at step {step}; the same command goes on from here"
            )
        return done

    def _rewind(self, skipped: TooManySkipped) -> None:
        """Goes back to the last good checkpoint, and on with the data behind the bad ones.

        Raises:
          ValueError: it went back often enough, or there is no such checkpoint.
        """
        train, rewinds = self.config.train, self._progress.rewinds
        with self._postponing_errors():  # one save at a time
            self.checkpoints.wait()
        folder = bad_steps.keep(self.workdir, self.config, self._state, self.batches, skipped)
        found = f"{skipped}; their batches and a checkpoint from before them are in {folder}"
        if rewinds >= train.rewinds:
            raise ValueError(
                f"{found}. Train there with --config.train.debug_nans=True to see the operation "
                f"at fault, or go on past them with --config.train.rewinds={rewinds + 1}."
            )
        if not self.checkpoints.drop_after_last_good():
            raise ValueError(f"{found}. There is no checkpoint from before them to go back to.")
        position = self.batches.get_state()
        state, kept = self.checkpoints.restore(abstract_state(self.config, self.mesh), self.batches)
        self.batches.set_state(position)
        self._begin(state, Progress(**kept | {"rewinds": rewinds + 1}))
        self.writer.drop_rows_after(self._step_done)
        self.writer.say(f"{found}; going on from step {self._step_done} with the data behind them")
