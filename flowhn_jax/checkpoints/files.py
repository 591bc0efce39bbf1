"""The files of a workdir's checkpoints, and the check that they belong to the run."""

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
from flowhn_jax.utils.files import write_atomically
from flowhn_jax.utils.version import __version__

# Beginnings of the names of a checkpoint's files.
PARAMS, METADATA = "params/", ("_CHECKPOINT_METADATA", "metrics/")
VALIDATION_LOSS = "validation_loss"

_MARK = "checkpointed.json"
_DELETED = "deleted."  # begins the name of a checkpoint that is being deleted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def warn(text: str) -> None:
    """Print a line to standard error, in the first process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def directory(workdir: str) -> pathlib.Path:
    """Return the folder of all checkpoints."""
    return pathlib.Path(workdir).absolute() / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Return the steps of the checkpoints, the newest first."""
    folder = directory(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def delete(workdir: str, step: int) -> None:
    """Delete a checkpoint; a kill at any moment leaves nothing that looks like one."""
    aside = directory(workdir) / f"{_DELETED}{step}"
    shutil.rmtree(aside, ignore_errors=True)
    (directory(workdir) / str(step)).rename(aside)
    shutil.rmtree(aside)


def finish_deletions(workdir: str) -> None:
    """Finish the deletions that a kill interrupted."""
    for path in directory(workdir).glob(f"{_DELETED}*"):
        shutil.rmtree(path)


def mark_checkpointed(workdir: str, step: int) -> None:
    """Record that the run has a checkpoint, so that a missing disk is noticed."""
    write_atomically(pathlib.Path(workdir) / _MARK, json.dumps({"step": step}) + "\n")


def check_not_gone(workdir: str) -> None:
    """Raise ValueError if the run had checkpoints and has none now."""
    path = pathlib.Path(workdir) / _MARK
    if path.is_file() and not steps_of(workdir):
        raise ValueError(
            f"{workdir!r} had checkpoints, but {str(directory(workdir))!r} holds none now: is its "
            f"disk mounted? To start from scratch there, remove {_MARK} and metrics.jsonl, or give "
            "another --workdir."
        )


def latest_step(workdir: str) -> int:
    """Return the step of the newest checkpoint in `workdir`; 0 if there is none."""
    return next(iter(steps_of(workdir)), 0)


class OfAnotherRun(ValueError):
    """A checkpoint is undamaged, but belongs to another run."""


def check_shapes(step: int, found: Any, params: Params) -> None:
    """Raise OfAnotherRun if a checkpoint's parameters have other shapes than `params`."""
    if found is None:  # Orbax could not read them
        raise ValueError(
            f"The shapes of the parameters in the checkpoint of step {step} cannot be read."
        )
    if changes := differences_of_shape(found, params):
        raise OfAnotherRun(
            f"The checkpoint of step {step} is of another model than --config; parameters that "
            f"differ in shape (checkpoint -> config): {changes}."
        )


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of what a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"flowhn-jax": __version__, "python": platform.python_version(), **packages}
