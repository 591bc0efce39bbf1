"""What is where in the checkpoints of a workdir, and whose they are."""

import functools
import importlib.metadata
import pathlib
import platform
import sys
from typing import Any

from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import is_first
from flowhn_jax.training.workdir import differences_of_shape

# Files of a checkpoint, by the beginnings of their names.
PARAMS, METADATA = "params/", ("_CHECKPOINT_METADATA", "metrics/")
VALIDATION_LOSS = "validation_loss"

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
