"""The training run: `fit` takes a config and a workdir to a trained model."""

import contextlib
import math

import jax
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.lock import locked
from flowhn_jax.checkpoints.state import abstract_state, init_state, learning_rate_schedule
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.distributed import (
    any_process,
    first_before_others,
    is_first,
    on_cloud_tpu,
)
from flowhn_jax.parallel.mesh import check_sequence, data_shard, make_mesh
from flowhn_jax.split.plan import partition_warning
from flowhn_jax.training.health.monitor import Progress
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.training.health.watchdog import Watchdog
from flowhn_jax.training.metrics import MetricsWriter, OnStep, SilentWriter
from flowhn_jax.training.run import Run
from kernels import backends


def fit(
    config: Config,
    workdir: str,
    on_step: OnStep | None = None,
    stop: StopRequest | None = None,
) -> bool:
    """Trains to `config.train.steps`, from the workdir's newest checkpoint where there is one.

    The workdir receives config.json, metrics.jsonl, tensorboard/, checkpoints/ and, with no
    data given, data/. On SIGINT, SIGTERM or a Cloud TPU's notice a checkpoint is written and the
    function returns.

    Args:
      config: the run.
      workdir: its folder.
      on_step: called behind each step, in place of a progress bar and lines; None: those.
      stop: what may ask it to stop, where the caller has been listening already.

    Returns:
      Whether all steps are done.

    Raises:
      ValueError: the config, the data and the workdir do not fit together, another process trains
        in the workdir, or too many steps in a row had no finite numbers.
      OSError: the disk was too full for the last checkpoint.
    """
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest())
        if on_cloud_tpu():
            stack.enter_context(stop.heeding_notices())
        watchdog = stack.enter_context(Watchdog(config.train.hang_minutes))
        mesh = make_mesh(config.mesh, eval_batch_size(config))
        with first_before_others("workdir"):
            workdir_lib.make(workdir)
        if is_first():
            stack.enter_context(locked(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(backends.use(config.kernels.backend))
        if config.train.debug_nans:
            stack.enter_context(jax.debug_nans(True))
        checkpoints = stack.enter_context(Checkpoints(workdir, config))
        start = checkpoints.latest_step
        config = workdir_lib.with_recorded_share(None if start is None else workdir, config)
        checkpoints.config = config
        check_sequence(config.model, mesh)
        changes = [] if start is None else workdir_lib.check(workdir, config)
        watchdog.progress("opening the data")
        prepared = _open_data(config, workdir, stop)
        if prepared is None:
            return _stopped(stop)
        part, parts = data_shard(mesh)
        batches = train_batches(
            prepared,
            batch_size=config.train.batch_size,
            seed=config.data.seed,
            process_index=part,
            process_count=parts,
        )
        stack.callback(batches.close)
        watchdog.progress("making or restoring the state")
        if start is None:
            state, progress = init_state(config, mesh, stop.is_asked), Progress()
            if state is None:
                return _stopped(stop)
        else:
            state, kept = checkpoints.restore(abstract_state(config, mesh), batches)
            progress = Progress(**kept)
        first = int(state.step)
        if first >= config.train.steps and progress.row is None:
            return _nothing_to_train(workdir, first, config.train.steps)
        if start is not None:
            changes += _changes_of_schedule(workdir, config, first)
        if is_first():
            workdir_lib.write_config(workdir, config)
        writes = MetricsWriter if is_first() else SilentWriter
        writer = stack.enter_context(writes(workdir, first, config.train.steps, on_step))
        _describe(config, prepared, mesh, writer)
        if start is not None:
            writer.say(f"resuming {workdir} at step {first}")
        for change in changes:
            writer.say(f"changed since the last run: {change}")
        run = Run(config, workdir, mesh, prepared, batches, checkpoints, writer, watchdog, stop)
        return run.go(state, progress)


def _open_data(config: Config, workdir: str, stop: StopRequest) -> PreparedSet | None:
    """The data; None where some process was asked to stop while the first one prepared them."""
    prepared = None
    with first_before_others("data"), contextlib.suppress(KeyboardInterrupt), stop.breaking_off():
        prepared = open_data(config, workdir)
    return None if any_process(prepared is None) else prepared


def _nothing_to_train(workdir: str, done: int, steps: int) -> bool:
    """Report that the run is at its end; nothing in the workdir is touched."""
    if is_first():
        print(
            f"{workdir} is at step {done:,}, and train.steps is {steps:,}: nothing to train. For "
            f"more steps raise it, as with --config.train.steps={2 * done}."
        )
    return True


def _changes_of_schedule(workdir: str, config: Config, step: int) -> list[str]:
    """Return what another recipe makes of the learning rate of the next step; a line, or none."""
    old, new = (
        float(learning_rate_schedule(train)(step))
        for train in (workdir_lib.read_config(workdir).train, config.train)
    )
    if math.isclose(old, new, rel_tol=1e-6):
        return []
    return [
        f"the learning rate of step {step + 1:,}: {old:.3g} -> {new:.3g}; the schedule now ends at "
        f"step {config.train.steps:,} with {config.train.final_learning_rate:g} of "
        f"{config.train.learning_rate:g}"
    ]


def _stopped(stop: StopRequest) -> bool:
    if is_first():
        print(f"stopped by {stop.reason or 'another process'} before there was anything to keep")
    return False


def _describe(config: Config, prepared: PreparedSet, mesh: Mesh, writer: MetricsWriter) -> None:
    model = config.model
    device = mesh.devices.flat[0]
    writer.say(f"{models.param_count(model):,} parameters")
    writer.say(f"{model.name}, context {model.context}, on {mesh.size} x {device.device_kind}")
    train, validation = prepared.splits["train"], prepared.splits["validation"]
    writer.say(
        f"data {prepared.folder}: {train.tokens:,} training tokens, "
        f"{validation.tokens:,} validation tokens, tokenizer {prepared.tokenizer.spec}"
    )
    if model.kind == "flowhn" and (warning := partition_warning(model.split, model.plan())):
        writer.say(f"warning: {warning}")
