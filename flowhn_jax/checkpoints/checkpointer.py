"""Checkpoints of a run: parameters, optimizer, step and the position in the data, with Orbax.

A checkpoint is a folder `checkpoints/STEP`, which appears when it is complete. In addition to
Orbax's arrays it holds the run's config, versions and progress (in Orbax's metadata) and the hashes
of its files (manifest.json), which are written last. A checkpoint without hashes counts if Orbax's
metadata say that it was committed and all its parts are there.
"""

import contextlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.files import (
    AVERAGE,
    METADATA,
    WrongCheckpointError,
    check_not_gone,
    delete,
    directory,
    finish_deletions,
    mark_checkpointed,
    set_aside,
    steps_of,
    versions,
    warn,
)
from flowhn_jax.checkpoints.losses import best_step, loss_key, validations
from flowhn_jax.checkpoints.restoring import load_state, progress_of
from flowhn_jax.checkpoints.saving import Save, set_barrier
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.config import Config
from flowhn_jax.parallel.distributed import broadcast_from_first, first_before_others, is_first
from flowhn_jax.utils.text import one_line

_EXTRA_BYTES = 2**20  # of a checkpoint, in addition to its arrays
_SECONDS_TO_END = 15.0  # how long a failing process of several waits for its save
_saves = itertools.count()


class Checkpoints:
    """The checkpoints of a training run; a context manager.

    Damaged checkpoints are moved to `damaged/` in the workdir, so that the run can write its own
    under their names: those newer than the newest undamaged one, and older ones whose metadata is
    damaged.
    """

    def __init__(
        self,
        workdir: str,
        config: Config,
        log: Callable[[str], None] = warn,
        confirm_lock: Callable[[], None] = lambda: None,
    ):
        """Open the checkpoints of the run in `workdir`.

        Args:
          workdir: folder of the run.
          config: the config of the run; it is stored in each checkpoint.
          log: prints a line for people.
          confirm_lock: raises OSError if this process, the first, may not write to the workdir now.

        Raises:
          ValueError: all checkpoints are damaged, there were some and all are gone, or the newest
            one holds parameters alone.
        """
        self._workdir = workdir
        self.config = config
        self._log = log
        self._confirm_lock = confirm_lock
        self._save: Save | None = None
        self._is_saving = False
        self._needed = 0  # bytes of the checkpoint that `fits` was last asked for
        with first_before_others("checkpoints"):
            if is_first():
                check_not_gone(workdir)
                finish_deletions(workdir)
                for step in self._damaged():
                    set_aside(self._workdir, step)
        for step in steps_of(workdir)[:1]:
            manifest.check_not_import(directory(workdir) / str(step))
        self._checkpointer = self._open()
        self._is_open = True

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
            self._checkpointer.close()
            return
        is_alone = jax.process_count() == 1
        if self._is_saving:
            assert self._save is not None
            self._save.wait(None if is_alone else _SECONDS_TO_END)
        if is_alone:  # otherwise closing would wait for processes that may have ended
            with contextlib.suppress(Exception):  # the error of the save
                self._checkpointer.close()

    def _open(self) -> ocp.training.Checkpointer:
        # Random mantissas hardly compress, and every reader gives its own shardings: without
        # compression and a sharding file a save costs a fifth less.
        def barrier(**arguments: Any) -> None:
            assert self._save is not None
            self._save.barrier(**arguments)

        context = ocp.Context()
        set_barrier(context.asynchronous, barrier)
        context.array.saving.use_compression = False
        context.array.saving.enable_write_sharding_file = False
        return ocp.training.Checkpointer(
            str(directory(self._workdir)),
            context=context,
            # Orbax's own policies do not match its protocols.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    def _prune(self) -> None:
        """Delete all checkpoints but the newest, the best ones and every `keep_every`-th step."""
        train, steps = self.config.train, steps_of(self._workdir)
        held = self._checkpointer.checkpoints
        metrics = {each.step: each.metrics for each in held if each.step in steps}
        known = validations(self._workdir, metrics)
        kept = {*steps[: train.keep_checkpoints]}
        kept |= {best_step(known, loss_key(train.best_by, ema=ema)) for ema in (False, True)}
        for step in steps:
            if step not in kept and not (train.keep_every and step % train.keep_every == 0):
                delete(self._workdir, step)

    def _damaged(self) -> list[int]:
        """Log and return the damaged checkpoints that Orbax would read.

        These are all that are newer than the newest undamaged one, and older ones whose metadata is
        damaged.
        """
        found = []
        steps = steps_of(self._workdir)
        for index, step in enumerate(steps):
            # Orbax reads the metadata of all, and everything of the one that the run continues.
            parts = "" if len(found) == index else METADATA
            damage = manifest.damage(directory(self._workdir) / str(step), parts)
            if damage is not None:
                self._log(f"the checkpoint of step {step} is damaged and skipped: {damage}")
                found.append(step)
        if found and len(found) == len(steps):
            raise ValueError(
                f"All checkpoints in {self._workdir!r} are damaged (of steps "
                f"{', '.join(map(str, steps))}); to start from scratch give another --workdir."
            )
        return found

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def fits(self, state: TrainState) -> bool:
        """Return whether a checkpoint can be written now; log why if not.

        A disk must have room for it, and a bucket must answer.

        All processes must call it, and get the same answer.
        """
        self.wait()
        self._needed = _EXTRA_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        why_not = broadcast_from_first(self._why_not() if is_first() else None)
        if why_not is None and not self._is_open:
            self._reopen()
            why_not = None if self._is_open else f"{self._workdir!r} cannot be read"
        if why_not is not None:
            self._log(f"no checkpoint of step {int(state.step)}: {why_not}; {self._newest()}")
        return why_not is None

    def _why_not(self) -> str | None:
        """Return why no checkpoint can be written now, as text; None: it can."""
        try:
            self._confirm_lock()
        except OSError as error:
            return one_line(error)
        if disk.missing(directory(self._workdir), self._needed):
            return self._missing()
        return None

    def shortage(self) -> str:
        """Return why the last checkpoint could not be written, as text."""
        if directory(self._workdir).is_remote:
            return f"{self._workdir!r} did not accept the checkpoint; {self._newest()}"
        return f"{self._missing()}; {self._newest()}"

    def _missing(self) -> str:
        missing = disk.missing(directory(self._workdir), self._needed)
        if not missing:
            return (
                f"it takes {disk.megabytes(self._needed)}, but the disk of {self._workdir!r}, or "
                "its quota, was full"
            )
        return (
            f"it takes {disk.megabytes(self._needed)}, of which {disk.megabytes(missing)} are "
            f"missing on the disk of {self._workdir!r}"
        )

    def _newest(self) -> str:
        if self.latest_step is None:
            return "there is no checkpoint yet"
        return f"the newest checkpoint is that of step {self.latest_step}"

    def save(
        self,
        state: TrainState,
        data: Any,
        progress: dict[str, Any],
        losses: dict[str, float] | None = None,
    ) -> None:
        """Begin to write a checkpoint; `wait`, or the next call, waits until it is complete.

        Args:
          state: the state of the run; it may be donated as soon as the function has returned.
          data: the iterator of the run's batches, whose position is saved.
          progress: what else the run saves; it must be representable in JSON.
          losses: validation losses of the state by their keys in a row, if known; the checkpoint
            with the lowest one by `train.best_by` is kept, and that of the average likewise.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step:  # the run was stopped before its first step
            return
        parts = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "data": data,
        }
        if state.ema is not None:
            parts[AVERAGE] = state.ema
        finite = {name: loss for name, loss in (losses or {}).items() if math.isfinite(loss)}
        metrics: Any = finite or None
        self._save, self._is_saving = Save(next(_saves)), True
        about: dict[str, Any] = {
            "metrics": metrics,
            "config": config_lib.to_dict(self.config),
            "versions": versions(),
            "progress": progress
            | {"skipped": int(state.skipped), "skipped_in_row": int(state.skipped_in_row)},
        }
        try:
            response = self._checkpointer.save_checkpointables_async(
                step, parts, force=True, metrics=metrics, custom_metadata=about
            )
        except Exception as error:
            if not disk.refuses_writes(error):
                raise
            self._save.start(partial(_raise, error))
            return

        def work() -> None:
            if response is not None:
                response.result()
            if is_first():
                manifest.write(directory(self._workdir) / str(step))
                directory(self._workdir).sync()
                mark_checkpointed(self._workdir, step)
                self._prune()

        # Other processes must not list checkpoints that the first one is deleting.
        self._save.start(work, self._reload if jax.process_count() == 1 else lambda: None)

    def _reload(self) -> None:
        """Forget the checkpoints that were deleted."""
        try:
            self._checkpointer.reload()
        except Exception as error:  # the checkpoint is complete all the same
            if not disk.refuses_writes(error):
                raise

    def error(self) -> BaseException | None:
        """Return the error that `wait` will raise in this process, if there is one so far."""
        return self._save.error() if self._save is not None and self._is_saving else None

    def wait(self) -> None:
        """Wait until the checkpoint that `save` began is complete, or log why it failed.

        All processes must call it; if one raises, all do.
        """
        if not self._is_saving:
            return
        assert self._save is not None
        self._is_saving = False
        self._save.wait()
        error = self._save.failure()
        if error is None:
            if jax.process_count() > 1:
                self._reload()
            return
        missing = self._missing()  # while the incomplete checkpoint takes its space
        with contextlib.suppress(Exception):  # the same error
            self._checkpointer.close()
        self._reopen()  # removes the incomplete checkpoint
        if not self._save.may_succeed_later():
            raise error
        if directory(self._workdir).is_remote:
            self._log(f"a checkpoint was not written: {one_line(error)}; {self._newest()}")
        else:
            self._log(
                f"the disk was full before a checkpoint was complete: {missing}; {self._newest()}"
            )

    def _reopen(self) -> None:
        """Open the checkpoints again, unless a bucket does not answer; `fits` then tries again."""
        self._is_open = False
        why_not = None
        if is_first() and directory(self._workdir).is_remote:
            try:
                finish_deletions(self._workdir)
            except OSError as error:
                why_not = one_line(error)
        if broadcast_from_first(why_not) is None:
            self._checkpointer = self._open()
            self._is_open = True

    def restore(self, abstract: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
        """Return the newest checkpoint's state, sharded as `abstract`, and its progress.

        `data` continues from the checkpoint's position. A checkpoint without hashes that cannot be
        read is moved to `damaged/`, and the next one is restored.

        Raises:
          ValueError: `data` is not what the checkpoint was trained on, or parameters have other
            shapes.
        """
        while True:
            step = self.latest_step
            assert step is not None, "there is no checkpoint to restore"
            folder = directory(self._workdir) / str(step)
            try:
                return self._load(step, abstract, data)
            except Exception as error:
                has_hashes = manifest.is_written(folder)  # which were checked
                is_last = self._checkpointer.checkpoints[0].step == step
                is_alone = jax.process_count() == 1
                if has_hashes or is_last or isinstance(error, WrongCheckpointError) or not is_alone:
                    raise
                self._log(
                    f"the checkpoint of step {step} is damaged and skipped: {one_line(error)}"
                )
            self._checkpointer.close()
            set_aside(self._workdir, step)
            self._checkpointer = self._open()

    def _load(
        self, step: int, abstract: TrainState, data: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        folder = directory(self._workdir) / str(step)
        load = partial(self._checkpointer.load_checkpointables, step)
        return load_state(folder, load, abstract, data, self._log)

    def drop_after_last_good(self) -> bool:
        """Delete the newest checkpoints whose last step was skipped; return whether one is left."""
        self.wait()
        for checkpoint in reversed(self._checkpointer.checkpoints):
            metadata = ocp.metadata(checkpoint.path, "params")
            if not progress_of(metadata).get("skipped_in_row"):
                return True
            with first_before_others("deleted"):
                if is_first():
                    delete(self._workdir, checkpoint.step)
            self._checkpointer.reload()
        return False


def _raise(error: Exception) -> None:
    raise error
