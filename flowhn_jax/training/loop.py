"""The training run: `fit` takes a config and a workdir to a trained model."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from flowhn_jax import flops, models
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.evaluation.perplexity import eval_batch_size, make_eval_step, validate
from flowhn_jax.parallel.distributed import any_process, first_before_others, is_first
from flowhn_jax.parallel.mesh import check_sequence, data_shard, make_mesh, shard_batch
from flowhn_jax.split.plan import partition_warning
from flowhn_jax.training import workdir as workdir_lib
from flowhn_jax.training.checkpoint import Checkpoints
from flowhn_jax.training.metrics import MetricsWriter, OnStep, Row, SilentWriter
from flowhn_jax.training.state import TrainState, abstract_state, init_state
from flowhn_jax.training.step import make_train_step
from kernels import backends


class _Interrupt:
    """Notes SIGINT and SIGTERM so that a run can stop between steps; a second one kills it."""

    def __init__(self):
        self.received: signal.Signals | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _note(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number)
        print("\nstopping behind the next step; the same again ends it at once", file=sys.stderr)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


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
        }


def _compile(train_step: Any, state: TrainState, batch: Any, writer: MetricsWriter) -> Callable:
    start = time.perf_counter()
    with backends.record() as chosen:
        compiled = train_step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    writer.say(f"compiled the train step in {seconds:.1f} s; {backends.describe(chosen)}")
    return compiled


def fit(config: Config, workdir: str, on_step: OnStep | None = None) -> bool:
    """Trains to `config.train.steps`, from the workdir's newest checkpoint where there is one.

    The workdir receives config.json, metrics.jsonl, tensorboard/, checkpoints/ and, with no
    data given, data/. On SIGINT or SIGTERM a checkpoint is written and the function returns.

    Args:
      config: the run.
      workdir: its folder.
      on_step: called behind each step, in place of a progress bar and lines; None: those.

    Returns:
      Whether all steps are done.

    Raises:
      ValueError: the config, the data and the workdir do not fit together.
    """
    mesh = make_mesh(config.mesh, eval_batch_size(config))
    with first_before_others("workdir"):
        workdir_lib.make(workdir)
    with (
        jax.set_mesh(mesh),
        backends.use(config.kernels.backend),
        _Interrupt() as interrupt,
        Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints,
        contextlib.ExitStack() as stack,
    ):
        start = checkpoints.latest_step
        config = workdir_lib.settle_balance(None if start is None else workdir, config)
        check_sequence(config.model, mesh)
        changes = [] if start is None else workdir_lib.check(workdir, config)
        with first_before_others("data"):
            prepared = open_data(config, workdir)
        part, parts = data_shard(mesh)
        batches = train_batches(
            prepared,
            batch_size=config.train.batch_size,
            seed=config.data.seed,
            process_index=part,
            process_count=parts,
        )
        stack.callback(batches.close)
        if start is None:
            state = init_state(config, mesh)
        else:
            state = checkpoints.restore(abstract_state(config, mesh), batches)
        if is_first():
            workdir_lib.write_config(workdir, config)
        writes = MetricsWriter if is_first() else SilentWriter
        with writes(workdir, start or 0, config.train.steps, on_step) as writer:
            _describe(config, prepared, mesh, writer)
            if start is not None:
                writer.say(f"resuming {workdir} at step {start}")
            for change in changes:
                writer.say(f"changed since the last run: {change}")
            return _run(config, prepared, batches, state, mesh, checkpoints, writer, interrupt)


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


def _run(
    config: Config,
    prepared: PreparedSet,
    batches: Iterator[Any],
    state: TrainState,
    mesh: Mesh,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    interrupt: _Interrupt,
) -> bool:
    """Trains to the last step; False where a signal came before it."""
    train = config.train
    train_step, eval_step = make_train_step(config, mesh), make_eval_step(config)
    first = int(state.step)
    clock = _Clock(config)
    compiled = None
    for step in range(first + 1, train.steps + 1):
        batch = shard_batch(next(batches), mesh)
        if compiled is None:
            compiled = _compile(train_step, state, batch, writer)
            clock.restart()
        state, metrics = compiled(state, batch)
        clock.count_step()
        writer.advance()

        last = step == train.steps
        evaluates = step % train.eval_every == 0 or last
        logs = step % train.log_every == 0 or evaluates
        stop = interrupt.received is not None
        if jax.process_count() > 1:  # agreed on where all wait for the devices anyway
            stop = logs and any_process(stop)
        if logs:
            values = {name: float(value) for name, value in metrics.items()}  # waits for the device
            row = {"step": step, **values, **clock.read(step, mesh)}
            if evaluates:
                quality = validate(
                    config, mesh, eval_step, state.params, prepared, train.eval_windows or None
                )
                row["validation_loss"] = quality.nll
                row["validation_bits_per_byte"] = quality.bits_per_byte
            writer.write(row)
            clock.restart()
        if step % train.checkpoint_every == 0 or last or stop:
            jax.block_until_ready(state)
            checkpoints.save(state, batches)
            clock.restart()
        if stop:
            name = interrupt.received.name if interrupt.received else "another process"
            writer.say(f"stopped by {name} at step {step}; the same command goes on from here")
            return last
    if first >= train.steps:
        writer.say(f"all {train.steps} steps are done already")
    return True
