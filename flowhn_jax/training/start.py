"""Where a run begins: its data, and its state, which is new or that of a checkpoint."""

import contextlib
import shlex
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.branch import Branch
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.losses import VALIDATION_LOSS
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.checkpoints.state import TrainState, abstract_state, make_init, state_of
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.run_data import RunData
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.interop import source as source_lib
from flowhn_jax.parallel.compilation import compile_unless
from flowhn_jax.parallel.distributed import (
    any_process,
    broadcast_from_first,
    first_before_others,
    is_first,
)
from flowhn_jax.training import messages
from flowhn_jax.training.console import Console
from flowhn_jax.training.health.monitor import RunProgress
from flowhn_jax.training.health.preemption import StopRequest


def load_data(config: Config, workdir: str, stop: StopRequest) -> RunData | None:
    """Return the run's data, on this host; None if a signal ends their preparation or their copy.

    Raises:
      ValueError, OSError: as in `open_data` and `RunData.load`.
    """
    data, is_loaded = None, False
    with first_before_others("data"), contextlib.suppress(KeyboardInterrupt), stop.interrupting():
        data = open_data(config, workdir)
    with contextlib.suppress(KeyboardInterrupt), stop.interrupting():
        if data is not None:
            data.load()
            is_loaded = True
    return None if any_process(not is_loaded) else data


class Origin:
    """Where a run begins: at its newest checkpoint, at one of another run, or at step 0.

    Attributes:
      workdir: folder of the run that the checkpoint belongs to; None: the run begins at step 0.
      config: the run's config, with balance 'time' replaced by the share recorded for that run.
    """

    def __init__(self, config: Config, workdir: str, checkpoints: Checkpoints):
        """Find the checkpoint, and check that the run may continue from it.

        Raises:
          FileNotFoundError: `train.branch_from` is no checkpoint.
          ValueError: the run has another model, or its source is damaged.
        """
        self._checkpoints, self._branch = checkpoints, None
        self.workdir = workdir if checkpoints.latest_step is not None else None
        if self.workdir is None and config.train.branch_from:
            self._branch = Branch(config)
            self.workdir = self._branch.workdir
        self.config = workdir_lib.with_recorded_share(self.workdir, config)
        self._changes = []
        if self.workdir is not None:
            self._changes = workdir_lib.check(self.workdir, self.config)

    def load_or_init_state(
        self,
        mesh: Mesh,
        data: RunData,
        batches: TrainBatches,
        should_stop: Callable[[], bool],
        console: Console,
    ) -> tuple[TrainState, RunProgress] | None:
        """Return the state and the progress; None if a request to stop comes first.

        Args:
          mesh: the mesh over which the state is sharded.
          data: the data of the run.
          batches: the iterator, which continues from the position of the checkpoint, if any.
          should_stop: whether this process is to stop, asked repeatedly while a program compiles.
          console: prints what is being done.
        """
        if self.workdir is None:
            with console.activity("initialising"):
                state = new_state(self.config, mesh, data.main, should_stop, console.log)
            return None if state is None else (state, RunProgress())
        restore = (self._branch or self._checkpoints).restore
        with console.activity("restoring"):
            state, kept = restore(abstract_state(self.config, mesh), batches)
        progress = RunProgress(**kept)
        if progress.row is not None and _is_validated(self.workdir, int(state.step)):
            progress.row = None  # an earlier start has made up for it
        return state, progress

    def record(
        self, workdir: str, tokenizer: Tokenizer, state: TrainState, command: str | None
    ) -> list[str]:
        """Write config.json, commands.txt and the origin's files; return lines about the origin.

        Args:
          workdir: folder of the run.
          tokenizer: the tokenizer of the run's data.
          state: the state that the run begins with.
          command: the command line of the run, for commands.txt.
        """
        changes, step = self._changes, int(state.step)
        if self.workdir is not None:
            skipped = int(state.skipped)
            changes = changes + messages.schedule_changes(self.workdir, self.config, step, skipped)
        if is_first():
            workdir_lib.write_config(workdir, self.config)
            workdir_lib.add_command(workdir, command)
            if self._branch is not None:
                self._branch.copy_rows(workdir)
            elif self.workdir is None and (source := self.config.train.init_from):
                source_lib.keep_files(source, tokenizer, workdir)
        if self.workdir is None:
            return []
        line, since = f"resuming {workdir} at step {step}", "the last run"
        if self._branch is not None:
            line, since = f"branching from {self.workdir} at step {step}", "the source"
        return [line, *(f"changed since {since}: {change}" for change in changes)]


def _is_validated(workdir: str, step: int) -> bool:
    """Return whether the rows of a run have a validation of a step."""
    rows = read_rows(workdir) if is_first() else []
    found = any(row["step"] == step and VALIDATION_LOSS in row for row in rows)
    return broadcast_from_first(found)


def new_state(
    config: Config,
    mesh: Mesh,
    prepared: PreparedSet,
    should_stop: Callable[[], bool],
    log: Callable[[str], None],
) -> TrainState | None:
    """Return the state of a run at step 0; None if a request to stop comes first.

    With `train.init_from` the parameters are those of the source; optimizer and schedule are new.

    Args:
      config: the config of the run.
      mesh: the mesh over which the state is sharded.
      prepared: the run's data.
      should_stop: whether this process is to stop, asked repeatedly while a program compiles.
      log: prints a line for people.

    Raises:
      ValueError, FileNotFoundError: the source is not a model, or does not fit the model or the
        data.
    """
    source = config.train.init_from
    if source:
        for change in source_lib.check_fit(source, source_lib.read_model(source), config.model):
            log(f"changed from {source}: {change}")
        _check_tokenizer(source, prepared, log)
        params = source_lib.load_params(source, config.model, mesh)
        log(f"parameters from {source}")
        return state_of(config, mesh, params)
    key = jax.random.key(config.train.seed)
    init = compile_unless(should_stop, make_init(config, mesh).lower(key))
    return None if init is None else init(key)


def _check_tokenizer(source: str, prepared: PreparedSet, log: Callable[[str], None]) -> None:
    """Raise ValueError if the data have another tokenizer than the source."""
    tokenizer = source_lib.read_tokenizer(source)
    if tokenizer is None:
        log(f"{source} has no tokenizer: that of the data is used unchecked")
    elif tokenizer.fingerprint != prepared.tokenizer_fingerprint:
        flags = [f"--tokenizer={tokenizer.spec}"]
        if tokenizer.eot_token is not None:
            flags.append(f"--eot_token={tokenizer.eot_token}")
        raise ValueError(
            f"The data {prepared.folder} must have the tokenizer of train.init_from, "
            f"{tokenizer.spec}; they have {prepared.tokenizer_spec}. Prepare them with "
            f"{shlex.join(flags)}"
        )
