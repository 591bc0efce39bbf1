"""What is where in the checkpoints of a workdir, and whose they are."""

import functools
import importlib.metadata
import json
import pathlib
import platform
import shutil
import sys
from typing import Any

from flowhn_jax.checkpoints.workdir import differences_of_shape
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.utils.files import whole_file

# Files of a checkpoint, by the beginnings of their names.
PARAMS, METADATA = "params/", ("_CHECKPOINT_METADATA", "metrics/")
VALIDATION_LOSS = "validation_loss"

_MARK = "checkpointed.json"
_DELETED = "deleted."  # begins the name of a checkpoint that is being deleted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def warn(text: str) -> None:
    """A line for people, of the first process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def directory(workdir: str) -> pathlib.Path:
    """The folder of all checkpoints."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Steps of the checkpoints, the newest first."""
    folder = directory(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def delete(workdir: str, step: int) -> None:
    """Delete a checkpoint; killed at any moment it leaves nothing that looks like one."""
    aside = directory(workdir) / f"{_DELETED}{step}"
    shutil.rmtree(aside, ignore_errors=True)
    (directory(workdir) / str(step)).rename(aside)
    shutil.rmtree(aside)


def finish_deletions(workdir: str) -> None:
    """Remove what a kill left of checkpoints that were being deleted."""
    for path in directory(workdir).glob(f"{_DELETED}*"):
        shutil.rmtree(path)


def mark_checkpointed(workdir: str, step: int) -> None:
    """Record that the run has a checkpoint, for the day on which its disk is missing."""
    with whole_file(pathlib.Path(workdir) / _MARK) as temporary:
        temporary.write_text(json.dumps({"step": step}) + "\n")


def check_not_gone(workdir: str) -> None:
    """Raise ValueError where a run had checkpoints, and there is none."""
    path = pathlib.Path(workdir) / _MARK
    if path.is_file() and not steps_of(workdir):
        raise ValueError(
            f"{workdir!r} has had checkpoints, but {str(directory(workdir))!r} holds none: is its "
            f"disk mounted? To start from scratch there, remove {_MARK} and metrics.jsonl, or give "
            "another --workdir."
        )


def latest_step(workdir: str) -> int:
    """Step of the newest checkpoint in `workdir`; 0 where there is none."""
    return next(iter(steps_of(workdir)), 0)


class OfAnotherRun(ValueError):
    """The checkpoint is whole, but not this run's."""


def check_shapes(step: int, found: Any, params: Params) -> None:
    """Raises OfAnotherRun where a checkpoint's parameters have other shapes than these."""
    if found is None:  # as of Orbax where it cannot read them
        raise ValueError(f"The checkpoint of step {step} does not tell its parameters' shapes.")
    if changes := differences_of_shape(found, params):
        raise OfAnotherRun(
            f"The checkpoint of step {step} is of another model; parameters that differ in shape, "
            f"there and here: {changes}."
        )


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and the packages that a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}
