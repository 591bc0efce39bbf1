"""Train a model, from its config to the last step: mesh, data, model, state, step, loop."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.losses import LOSSES
from flowhn_jax.checkpoints.rows import Row
from flowhn_jax.checkpoints.state import TrainState, abstract_state
from flowhn_jax.config import Config
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.pipeline import TrainBatches, train_batches
from flowhn_jax.data.run_data import RunData
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.compilation import compile_unless
from flowhn_jax.parallel.distributed import (
    broadcast_from_first,
    first_before_others,
    is_first,
    on_cloud_tpu,
)
from flowhn_jax.parallel.mesh import check_sequence, data_shard, make_mesh, shard_batch
from flowhn_jax.report.table import to_json
from flowhn_jax.storage import Lock
from flowhn_jax.training import messages
from flowhn_jax.training.agreement import StopAgreement
from flowhn_jax.training.console import Console, OnStep
from flowhn_jax.training.health import bad_steps
from flowhn_jax.training.health.monitor import Monitor, RunProgress, TooManySkippedError
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.training.health.watchdog import Watchdog
from flowhn_jax.training.profiler import Profiler
from flowhn_jax.training.speed import Speedometer
from flowhn_jax.training.start import Origin, load_data
from flowhn_jax.training.step import Metrics, abstract_batch, make_train_step
from flowhn_jax.training.time_use import Activity, TimeUse
from flowhn_jax.training.validation import Validator
from flowhn_jax.training.writers import Writer, check_packages, open_writer
from kernels import backends

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
OnEnd = Callable[[Config, Params, RunData], None]


def fit(
    config: Config,
    workdir: str,
    on_step: OnStep | None = None,
    stop: StopRequest | None = None,
    on_end: OnEnd | None = None,
    command: str | None = None,
) -> bool:
    """Train to step `config.train.steps`, from the newest checkpoint in the workdir if it has one.

    A workdir without one begins at the checkpoint that `train.branch_from` names, if any.

    The workdir receives config.json, metrics.jsonl, tensorboard/, checkpoints/ and, if the config
    names no data, data/. On SIGINT, SIGTERM or a maintenance notice of a Cloud TPU the function
    writes a checkpoint and returns.

    Args:
      config: the run.
      workdir: its folder.
      on_step: called after each step; turns off the console's lines and progress bar.
      stop: the requests to stop, if the caller has been listening for signals already.
      on_end: called after the last step, with the config, the parameters and the data.
      command: the command line of the run, for commands.txt.

    Returns:
      Whether all steps are done.

    Raises:
      ValueError: the config, the data and the workdir do not fit together, another process trains
        in the workdir, or too many steps in a row had no finite loss or gradients.
      OSError: the disk was too full for the last checkpoint.
    """
    time_use = TimeUse()
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest())
        if on_cloud_tpu():
            stack.enter_context(stop.watching_notices())
        watchdog = stack.enter_context(Watchdog(config.train.hang_minutes))

        # The mesh, on which everything below runs.
        mesh = make_mesh(config.mesh, eval_batch_size(config))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(backends.use(config.kernels.backend))
        if config.train.debug_nans:
            stack.enter_context(jax.debug_nans(True))
        console = Console(is_first() and on_step is None, on_step if is_first() else None)
        stack.enter_context(console)

        # The workdir: lock it, and check that a run to continue or branch from has this model.
        with first_before_others("workdir"):
            check_packages(config.train.writers)
            workdir_lib.make(workdir)
        lock = stack.enter_context(workdir_lib.locked(workdir)) if is_first() else Lock()
        checkpoints = stack.enter_context(Checkpoints(workdir, config, confirm_lock=lock.confirm))
        origin = Origin(config, workdir, checkpoints)
        checkpoints.config = config = origin.config
        check_sequence(config.model, mesh)

        # The data; a signal ends their preparation, or their copy to this host, at once.
        watchdog.progress("opening the data")
        data = load_data(config, workdir, stop)
        if data is None:
            console.log(messages.stopped_before_start(stop.reason))
            return False
        part, parts = data_shard(mesh)
        batches = train_batches(
            data,
            batch_size=config.train.batch_size,
            seed=config.data.seed,
            process_index=part,
            process_count=parts,
        )
        stack.callback(batches.close)

        # The model and its state, new or from a checkpoint.
        watchdog.progress("initialising")
        found = origin.load_or_init_state(mesh, data, batches, stop.is_requested, console)
        if found is None:
            console.log(messages.stopped_before_start(stop.reason))
            return False
        state, progress = found
        first = int(state.step)
        if first >= config.train.steps and progress.row is None:
            console.log(messages.nothing_to_train(workdir, first, config.train.steps))
            return True
        beginning = origin.record(workdir, data.tokenizer, state, command)
        writer = stack.enter_context(open_writer(config, workdir, first, console.log, lock))
        for line in (*messages.describe_start(config, data, mesh), *beginning):
            console.log(line)

        # The step and the loop.
        agreement = StopAgreement(mesh, stop, batches, checkpoints, lock)
        profiled = config.train.profiled_steps
        profiler = stack.enter_context(Profiler(profiled, workdir, console.log))
        validator = Validator(config, mesh, data, console)
        trainer = Trainer(
            config, workdir, mesh, batches, checkpoints, validator, writer, console, watchdog,
            stop, agreement, profiler, time_use,
        )  # fmt: skip
        is_done = trainer.train(state, progress)
        if is_done and on_end is not None:
            watchdog.progress("the summary")
            on_end(config, trainer.state.params, data)
        return is_done


@dataclasses.dataclass
class Trainer:
    """The loop of a run, over the parts that `fit` has opened."""

    config: Config
    workdir: str
    mesh: Mesh
    batches: TrainBatches
    checkpoints: Checkpoints
    validator: Validator
    writer: Writer
    console: Console
    watchdog: Watchdog
    stop: StopRequest
    agreement: StopAgreement
    profiler: Profiler
    time_use: TimeUse

    def __post_init__(self):
        self.speed = Speedometer(self.config)

    def train(self, state: TrainState, progress: RunProgress) -> bool:
        """Train to the last step; return False if a request to stop comes first.

        Raises:
          ValueError: too many steps in a row were skipped.
          OSError: the disk was too full for the last checkpoint.
          FailedElsewhereError: another process has an error.
        """
        self._start_from(state, progress)
        steps = self.config.train.steps
        # The row of a checkpoint that was written before its validation.
        if progress.row is not None and not self._validate(progress.row):
            self._save()
            return self._end()
        if self.step >= steps:  # only that validation was missing
            return self._end()
        with self.time_use.spent_on(Activity.DATA):
            # Twice: other processes learn of an error in the first batches one call later.
            self._should_stop()
            stops = self._should_stop()
            self.batches.pop_waited()
        if stops and self.agreement.has_error():  # in the first batches
            return self._end()
        train_step = self._compile()
        if train_step is None:
            self._save()
            return self._end()
        self.console.start_steps(self.step, steps)
        continues = True
        with self.time_use.spent_on(Activity.STEPS):
            while continues and self.step < steps:
                try:
                    continues = self._train_one_step(train_step)
                except TooManySkippedError as skipped:
                    with self.time_use.spent_on(Activity.OTHER):
                        self._rewind(skipped)
                except Exception as error:  # no save: other processes may be at another step
                    error.add_note(self._newest_checkpoint())
                    raise
        return self._end()

    def _start_from(self, state: TrainState, progress: RunProgress) -> None:
        """Continue the run from a state, its own or that of a checkpoint."""
        self.state = state
        self.step = int(state.step)
        self.progress = progress
        self.monitor = Monitor(progress, self.config.train.max_skipped, self._log)
        self.speed.restart()

    def _compile(self) -> TrainStep | None:
        """Return the compiled train step; None if a request to stop comes first."""
        self.watchdog.progress("compiling")
        function = make_train_step(self.config, self.mesh)
        if self.config.train.debug_nans:
            return function  # only jit itself finds the operation at fault
        start = time.perf_counter()
        with self.time_use.spent_on(Activity.COMPILING), self.console.activity("compiling"):
            with backends.record() as chosen:
                lowered = function.lower(self.state, abstract_batch(self.config, self.mesh))
            compiled = compile_unless(self.stop.is_requested, lowered)
        if compiled is not None:
            seconds = time.perf_counter() - start
            found = backends.describe(chosen)
            self.console.log(f"compiled the train step in {seconds:.1f} s; {found}")
        self.speed.restart()
        return compiled

    def _train_one_step(self, train_step: TrainStep) -> bool:
        """Do one step and what is due after it; return False if the run is to stop here."""
        train = self.config.train
        step = self.step + 1
        batch = shard_batch(next(self.batches), self.mesh)
        with self.profiler.before(step, self.state.step):
            self.state, metrics = train_step(self.state, batch)
        with self.time_use.spent_on(Activity.OTHER):
            self.profiler.after(step, metrics)
        self.step = step
        self.monitor.add(step, metrics)
        self.speed.count_step()
        with self.agreement.postponing_errors():
            self.console.count_step()

        is_last = step == train.steps
        validates = step % train.eval_every == 0 or is_last
        logs = step % train.log_every == 0 or validates
        if self.time_use.data_are_late:
            # Wait until the devices are idle, so that only their idle time counts as waiting.
            jax.block_until_ready(metrics)
        stops = self._should_stop()
        self.time_use.count_step(self.batches.pop_waited())
        saves = step % train.checkpoint_every == 0 or is_last or stops
        # The newest step is read one step later, so that the devices are never idle.
        values = self.monitor.read(everything=logs or saves)
        if values:
            self.watchdog.progress(f"step {step + 1}")
        losses = None
        if logs:
            row = {"step": step, **values, "spikes": self.progress.spikes}
            row |= self.speed.read(step, self.mesh) | self.time_use.row()
            row |= {f"epochs/{name}": each for name, each in self.batches.epochs().items()}
            if not validates:
                self._write(row)
            elif stops or not self._validate(row):
                stops = saves = True
                self.progress.row = row  # the next start validates
            else:
                losses = {key: row[key] for key in row if key.startswith(LOSSES)}
            self.speed.restart()
        if saves:
            self._save(losses)
            self.speed.restart()
        return not stops

    def _should_stop(self, validation: Lookahead[Batch] | None = None) -> bool:
        steps_left = max(0, self.config.train.steps - self.step)
        return self.agreement.should_stop(steps_left, validation)

    def _log(self, text: str) -> None:
        with self.agreement.postponing_errors():
            self.console.log(text)

    def _write(self, row: Row) -> None:
        with self.agreement.postponing_errors():
            self.writer.write(row)
            self.console.show(row)

    def _validate(self, row: Row) -> bool:
        """Add the state's quality to the row and write it; return False if the run is to stop."""

        def should_stop(batches: Lookahead[Batch]) -> bool:
            self.watchdog.progress("validating")
            return self._should_stop(batches)

        for params, ema in ((self.state.params, False), (self.state.ema, True)):
            if params is None:
                continue
            with self.time_use.spent_on(Activity.VALIDATION):
                scores = self.validator.score(params, should_stop)
            if scores is None:
                return False
            row |= scores.to_row(ema=ema)
        self.progress.row = None
        self._write(row)
        return True

    def _save(self, losses: dict[str, float] | None = None) -> None:
        """Begin to write a checkpoint, with its validation losses, if the disk has room for it."""
        with self.time_use.spent_on(Activity.CHECKPOINTS):
            self._begin_save(losses)

    def _begin_save(self, losses: dict[str, float] | None) -> None:
        self.watchdog.progress("saving")
        with self.agreement.postponing_errors():  # of the previous save, in all processes
            self.checkpoints.wait()
        if not self.checkpoints.fits(self.state):
            return
        # All rows up to a checkpoint's step must be on the disk before the checkpoint.
        has_rows = False
        with self.agreement.postponing_errors():
            has_rows = self.writer.flush()
        if broadcast_from_first(has_rows):
            progress = json.loads(to_json(dataclasses.asdict(self.progress)))
            self.checkpoints.save(self.state, self.batches, progress, losses)

    def _rewind(self, skipped: TooManySkippedError) -> None:
        """Return to the last good checkpoint, and continue with the data after the bad batches.

        Raises:
          ValueError: the run has gone back `train.rewinds` times, or there is no such checkpoint.
        """
        train, rewinds = self.config.train, self.progress.rewinds
        with self.agreement.postponing_errors():
            self.checkpoints.wait()
        folder = bad_steps.write_debug_workdir(
            self.workdir, self.config, self.state, self.batches, skipped
        )
        found = f"{skipped}; their batches and a checkpoint from before them are in {folder}"
        if rewinds >= train.rewinds:
            raise ValueError(
                f"{found}. Type python train.py --workdir={folder} --config.train.debug_nans=True "
                "to see the operation at fault, or skip these batches with "
                f"--config.train.rewinds={rewinds + 1}."
            )
        if not self.checkpoints.drop_after_last_good():
            raise ValueError(f"{found}. There is no checkpoint from before them to return to.")
        position = self.batches.get_state()
        state, kept = self.checkpoints.restore(abstract_state(self.config, self.mesh), self.batches)
        self.batches.set_state(position)
        self._start_from(state, dataclasses.replace(RunProgress(**kept), rewinds=rewinds + 1))
        self.writer.drop_rows_after(self.step)
        self.console.move_to(self.step)
        self.console.log(f"{found}; continuing from step {self.step} with the data after them")

    def _end(self) -> bool:
        """Wait for the last checkpoint; return whether all steps are done.

        Raises:
          Exception: the error of this process for which the run stopped.
          FailedElsewhereError: the run stopped for an error of another process.
          OSError: the last checkpoint did not fit on the disk.
        """
        self.console.end_steps()
        with self.time_use.spent_on(Activity.CHECKPOINTS), self.agreement.postponing_errors():
            self.checkpoints.wait()
        self.agreement.raise_error(self._newest_checkpoint())
        if self.checkpoints.latest_step != self.step:
            reason = self.checkpoints.shortage()
            raise OSError(
                f"the run ends at step {self.step} without a checkpoint: {reason}; run the same "
                "command again to continue."
            )
        self.console.log(self.time_use.describe())
        done = self.step == self.config.train.steps and self.progress.row is None
        if not done:
            self.console.log(messages.stopped(self.stop.reason, self.step))
        return done

    def _newest_checkpoint(self) -> str:
        return messages.ends_early(self.step, self.checkpoints.latest_step)
