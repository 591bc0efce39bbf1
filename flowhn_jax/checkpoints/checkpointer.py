"""Checkpoints of a run: parameters, optimizer, step and the position in the data, with Orbax.

A checkpoint is a folder `checkpoints/STEP` that appears when it is whole. Beside Orbax's arrays it
holds the run's config, versions and progress (Orbax's metadata) and the hashes of its files
(manifest.json), which are written last. One without them counts where Orbax's metadata say that it
was committed and all its parts are there.
"""

import contextlib
import itertools
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.files import (
    METADATA,
    VALIDATION_LOSS,
    OfAnotherRun,
    check_not_gone,
    check_shapes,
    delete,
    directory,
    finish_deletions,
    mark_checkpointed,
    steps_of,
    versions,
    warn,
)
from flowhn_jax.checkpoints.saving import Save, set_barrier
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.config import Config
from flowhn_jax.parallel.distributed import broadcast_from_first, first_before_others, is_first
from flowhn_jax.utils.files import sync

_BYTES_BESIDE = 2**20  # of a checkpoint, at least: what is not arrays
_SECONDS_TO_END = 15.0  # of a save, in a process of several that ends with an error
_saves = itertools.count()


class Checkpoints:
    """The checkpoints of a training run; use as a context manager.

    Damaged ones that are newer than the newest whole one are moved to `damaged/` in the workdir, so
    that the run can write its own under their names.
    """

    def __init__(self, workdir: str, config: Config, say: Callable[[str], None] = warn):
        """`config` goes into each checkpoint; `say` prints what becomes of them.

        Raises:
          ValueError: there are checkpoints, and all are damaged; or there were, and all are gone.
        """
        self._workdir = workdir
        self.config = config
        self._say = say
        self._save: Save | None = None
        self._is_saving = False
        self._needed = 0  # bytes, of the last checkpoint that was asked for
        with first_before_others("checkpoints"):
            if is_first():
                check_not_gone(workdir)
                finish_deletions(workdir)
                for step in self._damaged():
                    self._set_aside(step)
        self._checkpointer = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.wait()
            self._checkpointer.close()
            return
        is_alone = jax.process_count() == 1
        if self._is_saving:
            self._save.wait(None if is_alone else _SECONDS_TO_END)
        if is_alone:  # else the others may not come by
            with contextlib.suppress(Exception):  # that of the save
                self._checkpointer.close()

    def _open(self) -> ocp.training.Checkpointer:
        # Random mantissas hardly compress, and shardings are given wherever a checkpoint is read:
        # without both a save costs a fifth less.
        def barrier(**arguments: Any) -> None:
            self._save.barrier(**arguments)

        context = ocp.Context()
        set_barrier(context.asynchronous, barrier)
        context.array.saving.use_compression = False
        context.array.saving.enable_write_sharding_file = False
        return ocp.training.Checkpointer(
            directory(self._workdir),
            context=context,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # see _prune
            cleanup_tmp_directories=True,
        )

    def _prune(self) -> None:
        """Delete all checkpoints but the newest, the best one, and those kept for good."""
        train, losses = self.config.train, dict(self._losses())
        steps = steps_of(self._workdir)
        kept = {*steps[: train.keep_checkpoints]}
        if losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step in steps:
            if step not in kept and not (train.keep_every and step % train.keep_every == 0):
                delete(self._workdir, step)

    def _losses(self) -> Iterator[tuple[int, float]]:
        """Yield the steps whose validation loss is known, and it."""
        for checkpoint in self._checkpointer.checkpoints:
            loss = (checkpoint.metrics or {}).get(VALIDATION_LOSS)
            if loss is not None and (directory(self._workdir) / str(checkpoint.step)).is_dir():
                yield checkpoint.step, loss

    def _damaged(self) -> list[int]:
        """The damaged ones before the newest that is not, and of those behind it as Orbax reads.

        Each is told.
        """
        found = []
        steps = steps_of(self._workdir)
        for index, step in enumerate(steps):
            # Of all it reads these, and of the one that the run goes on from everything.
            parts = "" if len(found) == index else METADATA
            damage = manifest.damage(directory(self._workdir) / str(step), parts)
            if damage is not None:
                self._say(f"the checkpoint of step {step} is damaged and skipped: {damage}")
                found.append(step)
        if found and len(found) == len(steps):
            raise ValueError(
                f"All checkpoints in {self._workdir!r} are damaged (of steps "
                f"{', '.join(map(str, steps))}); give another --workdir to begin anew."
            )
        return found

    def _set_aside(self, step: int) -> None:
        aside = pathlib.Path(self._workdir).absolute() / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (directory(self._workdir) / str(step)).rename(aside)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def fits(self, state: TrainState) -> bool:
        """Whether the disk has room for a checkpoint; a line tells how much is missing.

        All processes must call it, and get the same answer.
        """
        self.wait()
        self._needed = _BYTES_BESIDE + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        fits = not broadcast_from_first(disk.missing(directory(self._workdir), self._needed))
        if not fits:
            self._say(f"no checkpoint of step {int(state.step)}: {self.shortage()}")
        return fits

    def shortage(self) -> str:
        """Room that the last checkpoint asked for, and what there is, in words."""
        missing = disk.missing(directory(self._workdir), self._needed)
        return (
            f"it takes {disk.megabytes(self._needed)}, of which {disk.megabytes(missing)} are "
            f"missing on the disk of {self._workdir!r}; the newest is {self._newest()}"
        )

    def _newest(self) -> str:
        return "none yet" if self.latest_step is None else f"that of step {self.latest_step}"

    def save(
        self,
        state: TrainState,
        data: Any,
        progress: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint; `wait`, or the next call, waits for its end.

        Args:
          state: of the run; it may be donated as soon as the function has returned.
          data: the iterator of its batches, whose position is kept.
          progress: what the run keeps beside, for JSON.
          validation_loss: of the state, where it is known; the least one's checkpoint is kept.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest_step:  # the run was stopped before it did a step
            return
        parts = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "data": data,
        }
        metrics = None
        if validation_loss is not None and math.isfinite(validation_loss):
            metrics = {VALIDATION_LOSS: validation_loss}
        self._save, self._is_saving = Save(next(_saves)), True
        response = self._checkpointer.save_checkpointables_async(
            step,
            parts,
            force=True,
            metrics=metrics,
            custom_metadata={
                "metrics": metrics,
                "config": config_lib.to_dict(self.config),
                "versions": versions(),
                "progress": progress
                | {"skipped": int(state.skipped), "skipped_in_row": int(state.skipped_in_row)},
            },
        )

        def work() -> None:
            response.result()
            if is_first():
                manifest.write(directory(self._workdir) / str(step))
                sync(directory(self._workdir))
                mark_checkpointed(self._workdir, step)
                self._prune()

        self._save.start(work)

    def error(self) -> BaseException | None:
        """Return the error that `wait` is going to raise here, if there is one by now."""
        return self._save.error() if self._is_saving else None

    def wait(self) -> None:
        """Waits until what `save` began is on the disk; a full disk is told, and no error.

        All processes must call it; where one raises, all do.
        """
        if not self._is_saving:
            return
        self._is_saving = False
        self._save.wait()
        error = self._save.failure()
        if error is None:
            self._checkpointer.reload()  # what was pruned
            return
        with contextlib.suppress(Exception):  # the same error again
            self._checkpointer.close()
        self._checkpointer = self._open()  # which removes what was written of it
        if not self._save.is_full():
            raise error
        self._say(f"the disk was full before a checkpoint was written: {self.shortage()}")

    def restore(self, abstract: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint's state, laid out as `abstract`, and its progress.

        It moves `data` to its position. A checkpoint without hashes that turns out to be damaged is
        set aside, as in the beginning.

        Raises:
          ValueError: `data` is not what the checkpoint was trained on, parameters have other
            shapes, or the checkpoint holds parameters alone.
        """
        while True:
            step = self.latest_step
            folder = directory(self._workdir) / str(step)
            try:
                return self._load(step, abstract, data)
            except Exception as error:
                checked = manifest.is_written(folder)
                alone = self._checkpointer.checkpoints[0].step == step
                if checked or alone or isinstance(error, OfAnotherRun) or jax.process_count() > 1:
                    raise
                self._say(f"the checkpoint of step {step} is damaged and skipped: {error}")
            self._checkpointer.close()
            self._set_aside(step)
            self._checkpointer = self._open()

    def _load(
        self, step: int, abstract: TrainState, data: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        load = self._checkpointer.load_checkpointables
        folder = directory(self._workdir) / str(step)
        if manifest.is_import(folder):
            raise OfAnotherRun(
                f"The checkpoint of step {step} holds parameters alone, as an import does: "
                "eval.py reads it, but no training can go on from it."
            )
        found = ocp.metadata(folder, "params")
        check_shapes(step, found.metadata, abstract.params)
        try:
            load(step, {"data": data})
        except KeyError as error:  # how Orbax wraps what a checkpointable raises
            raise OfAnotherRun(str(error.__cause__)) if error.__cause__ else error from error
        optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
        parts = load(step, {"params": abstract.params, "optimizer": optimizer})
        progress = _progress(found)
        counts = {
            name: jax.device_put(
                jax.numpy.int32(progress.pop(name, 0)), getattr(abstract, name).sharding
            )
            for name in ("skipped", "skipped_in_row")
        }
        return TrainState(params=parts["params"], **parts["optimizer"], **counts), progress

    def drop_after_last_good(self) -> bool:
        """Removes the newest checkpoints whose last step was skipped; whether any is left."""
        self.wait()
        for checkpoint in reversed(self._checkpointer.checkpoints):
            metadata = ocp.metadata(checkpoint.path, "params")
            if not _progress(metadata).get("skipped_in_row"):
                return True
            with first_before_others("deleted"):
                if is_first():
                    delete(self._workdir, checkpoint.step)
            self._checkpointer.reload()
        return False


def _progress(metadata: Any) -> dict[str, Any]:
    """Of a checkpoint's metadata; there was none in earlier versions."""
    return (metadata.custom_metadata or {}).get("progress", {})
