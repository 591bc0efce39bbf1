"""Branching: beginning a run at a checkpoint of another run."""

from functools import partial
from typing import Any

from orbax.checkpoint import v1 as ocp

from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.files import steps_of, warn
from flowhn_jax.checkpoints.restoring import load_state
from flowhn_jax.checkpoints.rows import FILE, read_rows, write_rows
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.config import Config
from flowhn_jax.parallel.distributed import first_before_others, is_first
from flowhn_jax.storage import place
from flowhn_jax.utils.checks import require
from flowhn_jax.utils.text import short_repr

_KEY = "train.branch_from"


class Branch:
    """The beginning of a run at the checkpoint that `train.branch_from` names.

    Attributes:
      workdir: folder of the run that the checkpoint belongs to.
      step: the step of the checkpoint.
    """

    def __init__(self, config: Config):
        """Check that the run of `config` can begin at the checkpoint; all processes must call it.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it is damaged, or the run has no step after it.
        """
        self._folder = place(config.train.branch_from).absolute()
        self.workdir, self.step = str(self._folder.parent.parent), int(self._folder.name)
        with first_before_others("branch"):
            if is_first():
                self._check()
        steps = config.train.steps
        require(steps > self.step, "train.steps", f"above {self.step}, the step of {_KEY}", steps)

    def _check(self) -> None:
        steps = steps_of(self.workdir)
        if self.step not in steps:
            there = f"the steps {', '.join(map(str, sorted(steps)))}" if steps else "none"
            raise FileNotFoundError(
                f"{_KEY} must be a checkpoint WORKDIR/checkpoints/STEP; {self.workdir!r} holds "
                f"{there}; got {short_repr(str(self._folder))}."
            )
        if damage := manifest.damage(self._folder):
            raise ValueError(f"{_KEY}: {str(self._folder)!r} is damaged: {damage}. Give another.")
        manifest.check_not_import(self._folder)

    def restore(self, abstract: TrainState, data: Any) -> tuple[TrainState, dict[str, Any]]:
        """Return the checkpoint's state, sharded as `abstract`, and its progress.

        See `load_state`.
        """
        load = partial(ocp.load_checkpointables, str(self._folder))
        return load_state(self._folder, load, abstract, data, warn)

    def copy_rows(self, workdir: str) -> None:
        """Write the rows up to the checkpoint as those of the new run in `workdir`."""
        rows = [row for row in read_rows(self.workdir) if row["step"] <= self.step]
        write_rows(place(workdir) / FILE, rows)
