"""Reads parameters from the checkpoints of a workdir, and writes them into a new one."""

from typing import Any

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.files import (
    AVERAGE,
    METADATA,
    PARAMS,
    WrongCheckpointError,
    check_shapes,
    directory,
    steps_of,
    versions,
    warn,
)
from flowhn_jax.checkpoints.losses import best_step, loss_key, validations
from flowhn_jax.checkpoints.workdir import read_config
from flowhn_jax.config import ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import broadcast_from_first, is_first
from flowhn_jax.parallel.rules import with_shardings
from flowhn_jax.utils.text import one_line, short_repr

LATEST, BEST = "latest", "best"


def save_params(workdir: str, model: ModelConfig, params: Params) -> None:
    """Write the parameters of a model that was trained elsewhere as the checkpoint of step 0."""
    about: dict[str, Any] = {"config": {"model": config_lib.to_dict(model)}, "versions": versions()}
    about["imported"] = True
    with ocp.training.Checkpointer(str(directory(workdir))) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params}, force=True, custom_metadata=about)
    manifest.write(directory(workdir) / "0")


def load_params(
    workdir: str, config: ModelConfig, mesh: Mesh, checkpoint: str = LATEST, ema: bool = False
) -> Params:
    """Return the parameters of a checkpoint in `workdir`, sharded over the mesh.

    Args:
      workdir: the folder of a run.
      config: its model.
      mesh: where to place the parameters.
      checkpoint: 'latest', the newest that is not damaged; 'best', the one with the lowest
        validation loss by the run's `train.best_by`; or a step.
      ema: whether to load the average of the parameters (train.ema) in their place; 'best' is then
        the checkpoint with the average's lowest validation loss.

    Raises:
      FileNotFoundError: there is no checkpoint, not the one asked for, or no average in it.
      ValueError: it is damaged, or of another model.
    """
    step = broadcast_from_first(find_step(workdir, checkpoint, ema) if is_first() else 0)
    abstract = with_shardings(models.abstract_params(config), mesh)
    folder, part = directory(workdir) / str(step), AVERAGE if ema else "params"
    if not (folder / part).is_dir():
        raise FileNotFoundError(
            f"--ema needs an average of the parameters; the checkpoint of step {step} in "
            f"{workdir!r} has none. Train with --config.train.ema=0.999, or leave --ema out."
        )
    try:
        # Not with a Checkpointer, which would read all steps, damaged ones too.
        check_shapes(step, ocp.metadata(str(folder), part).metadata, abstract)
        return ocp.load_checkpointables(str(folder), {part: abstract})[part]
    except WrongCheckpointError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise ValueError(
            f"The checkpoint of step {step} in {workdir!r} cannot be read: {one_line(error)}"
        ) from error


def find_step(workdir: str, checkpoint: str, ema: bool = False) -> int:
    """Return the step of a checkpoint that is not damaged, as `load_params` names them.

    Raises:
      FileNotFoundError: there is no checkpoint, or not the one asked for.
      ValueError: it is damaged; if `checkpoint` is 'latest', all are.
    """
    steps = steps_of(workdir)
    if not steps:
        raise FileNotFoundError(
            f"--workdir must hold a checkpoint; there is none in {workdir!r} yet. Train a run "
            f"there: python train.py --config=... --workdir={workdir}"
        )
    candidates = steps
    if checkpoint == BEST:
        candidates = [_best(workdir, ema)]
    elif checkpoint != LATEST:
        candidates = [step for step in steps if str(step) == checkpoint]
        if not candidates:
            raise FileNotFoundError(
                f"--checkpoint must be {LATEST}, {BEST} or one of the steps "
                f"{', '.join(map(str, sorted(steps)))} in {workdir!r}; got "
                f"{short_repr(checkpoint)}."
            )
    parts = f"{AVERAGE}/" if ema else PARAMS
    for step in candidates:
        damage = manifest.damage(directory(workdir) / str(step), (parts, *METADATA))
        if damage is None:
            return step
        warn(f"the checkpoint of step {step} is damaged: {damage}")
    found = ", ".join(map(str, candidates))
    if checkpoint == LATEST:
        raise ValueError(f"All checkpoints of {workdir!r} are damaged: those of steps {found}.")
    raise ValueError(
        f"--checkpoint must name an undamaged checkpoint of {workdir!r}; got {checkpoint!r}; "
        f"that of step {found} is damaged."
    )


def _best(workdir: str, ema: bool) -> int:
    """Return the step of the best checkpoint; with `ema`, the one with the best average."""
    key, metrics = loss_key(read_config(workdir).train.best_by, ema=ema), {}
    for step in steps_of(workdir):
        folder = directory(workdir) / str(step)
        if manifest.damage(folder, METADATA) is None:
            about: Any = ocp.metadata(str(folder), "params").custom_metadata or {}
            metrics[step] = about.get("metrics")
    best = best_step(validations(workdir, metrics), key)
    if best is None:
        raise FileNotFoundError(
            f"--checkpoint={BEST} needs a checkpoint with a {key}; {workdir!r} holds "
            f"none. Give --checkpoint={LATEST} or a step."
        )
    return best
