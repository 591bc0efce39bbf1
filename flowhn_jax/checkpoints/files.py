"""The files of a workdir's checkpoints, and the check that they belong to the run."""

import functools
import importlib.metadata
import json
import platform
import sys
from typing import Any

from flowhn_jax.checkpoints.workdir import differences_of_shape
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.version import __version__

# Beginnings of the names of a checkpoint's files.
PARAMS, METADATA = "params/", ("_CHECKPOINT_METADATA", "metrics/")
AVERAGE = "ema"  # the part of a checkpoint with the average

COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint, in a bucket

_MARK = "checkpointed.json"
_DELETED = "deleted."  # begins the name of a checkpoint that is being deleted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def warn(text: str) -> None:
    """Print a line to standard error, in the first process."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def directory(workdir: str) -> Place:
    """Return the folder of all checkpoints."""
    return place(workdir).absolute() / "checkpoints"


def steps_of(workdir: str) -> list[int]:
    """Return the steps of the checkpoints, the newest first.

    In a bucket a folder is a checkpoint only with Orbax's mark, because a killed save leaves a part
    of it under the final name; locally a checkpoint is renamed when it is complete.
    """
    found = (each for each in directory(workdir).children() if each.name.isdecimal())
    steps = (int(each.name) for each in found if is_committed(each))
    return sorted(steps, reverse=True)


def is_committed(folder: Place) -> bool:
    """Return whether a folder named like a checkpoint is a committed checkpoint."""
    return not folder.is_remote or (folder / COMMITTED).is_file()


def delete(workdir: str, step: int) -> None:
    """Delete a checkpoint; a kill at any moment leaves nothing that looks like one."""
    folder = directory(workdir) / str(step)
    if folder.is_remote:
        folder.remove_tree(COMMITTED)
        return
    aside = directory(workdir) / f"{_DELETED}{step}"
    aside.remove_tree()
    folder.rename(aside, COMMITTED)
    aside.remove_tree()


def finish_deletions(workdir: str) -> None:
    """Finish the deletions, and in a bucket the saves, that a kill interrupted."""
    for each in directory(workdir).children():
        if each.name.startswith(_DELETED) or (each.name.isdecimal() and not is_committed(each)):
            each.remove_tree()


def set_aside(workdir: str, step: int) -> None:
    """Move a damaged checkpoint to `damaged/` in the workdir."""
    aside = place(workdir).absolute() / "damaged" / str(step)
    aside.remove_tree()
    aside.parent.make_folder()
    (directory(workdir) / str(step)).rename(aside, COMMITTED)


def mark_checkpointed(workdir: str, step: int) -> None:
    """Record that the run has a checkpoint, so that a missing disk is noticed."""
    (place(workdir) / _MARK).write_whole(json.dumps({"step": step}) + "\n")


def check_not_gone(workdir: str) -> None:
    """Raise ValueError if the run had checkpoints and has none now."""
    if (place(workdir) / _MARK).is_file() and not steps_of(workdir):
        folder = directory(workdir)
        cause = (
            f"were they removed, or copied there without their {COMMITTED}?"
            if folder.is_remote
            else "is its disk mounted?"
        )
        raise ValueError(
            f"{workdir!r} had checkpoints, but {str(folder)!r} holds none now: {cause} To start "
            f"from scratch there, remove {_MARK} and metrics.jsonl, or give another --workdir."
        )


def latest_step(workdir: str) -> int:
    """Return the step of the newest checkpoint in `workdir`; 0 if there is none."""
    return next(iter(steps_of(workdir)), 0)


class WrongCheckpointError(ValueError):
    """A checkpoint is undamaged, but belongs to another run."""


def check_shapes(step: int, found: Any, params: Params) -> None:
    """Raise WrongCheckpointError if a checkpoint's parameters have other shapes than `params`."""
    if found is None:  # Orbax could not read them
        raise ValueError(
            f"The shapes of the parameters in the checkpoint of step {step} cannot be read."
        )
    if changes := differences_of_shape(found, params):
        raise WrongCheckpointError(
            f"The checkpoint of step {step} is of another model than --config; parameters that "
            f"differ in shape (checkpoint -> config): {changes}."
        )


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of what a run's numbers depend on."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"flowhn-jax": __version__, "python": platform.python_version(), **packages}
