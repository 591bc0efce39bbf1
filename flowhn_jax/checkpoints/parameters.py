"""Parameters from the checkpoints of a workdir, and into a new one."""

from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.files import (
    METADATA,
    PARAMS,
    VALIDATION_LOSS,
    OfAnotherRun,
    check_shapes,
    directory,
    steps_of,
    versions,
    warn,
)
from flowhn_jax.config import ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.parallel.distributed import broadcast_from_first, is_first
from flowhn_jax.parallel.rules import with_shardings
from flowhn_jax.utils.text import one_line, short_repr

LATEST, BEST = "latest", "best"


def save_params(workdir: str, model: ModelConfig, params: Params) -> None:
    """Writes parameters alone, of a model that was trained elsewhere, as step 0."""
    about = {"config": {"model": config_lib.to_dict(model)}, "versions": versions()}
    about["imported"] = True
    with ocp.training.Checkpointer(directory(workdir)) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params}, force=True, custom_metadata=about)
    manifest.write(directory(workdir) / "0")


def load_params(workdir: str, config: ModelConfig, mesh: Mesh, checkpoint: str = LATEST) -> Params:
    """Parameters of a checkpoint in `workdir`, laid over the mesh.

    Args:
      workdir: the folder of a run.
      config: its model.
      mesh: for the parameters.
      checkpoint: 'latest', the newest that is not damaged; 'best', that of the least validation
        loss; or a step.

    Raises:
      FileNotFoundError: there is none, or not that one.
      ValueError: it is damaged, or of another model.
    """
    step = broadcast_from_first(_choose(workdir, checkpoint) if is_first() else 0)
    abstract = with_shardings(models.abstract_params(config), mesh)
    folder = directory(workdir) / str(step)
    try:
        # Not by a Checkpointer, which reads of all steps, damaged ones too.
        check_shapes(step, ocp.metadata(folder, "params").metadata, abstract)
        return ocp.load_checkpointables(folder, {"params": abstract})["params"]
    except OfAnotherRun:
        raise
    except Exception as error:  # Orbax and TensorStore have many kinds
        raise ValueError(
            f"The checkpoint of step {step} in {workdir!r} cannot be read: {one_line(error)}"
        ) from error


def _choose(workdir: str, checkpoint: str) -> int:
    steps = steps_of(workdir)
    if not steps:
        raise FileNotFoundError(
            f"{workdir!r} holds no whole checkpoint; train with --workdir first, or let it go on."
        )
    candidates = steps
    if checkpoint == BEST:
        candidates = [_best(workdir)]
    elif checkpoint != LATEST:
        candidates = [step for step in steps if str(step) == checkpoint]
        if not candidates:
            raise FileNotFoundError(
                f"{workdir!r} holds no checkpoint {short_repr(checkpoint)}; accepted are {LATEST}, "
                f"{BEST}, and the steps {', '.join(map(str, sorted(steps)))}."
            )
    for step in candidates:
        damage = manifest.damage(directory(workdir) / str(step), (PARAMS, *METADATA))
        if damage is None:
            return step
        warn(f"the checkpoint of step {step} is damaged: {damage}")
    raise ValueError(
        f"No checkpoint of {workdir!r} is left to read: damaged are those of steps "
        f"{', '.join(map(str, candidates))}."
    )


def _best(workdir: str) -> int:
    losses = {}
    for step in steps_of(workdir):
        folder = directory(workdir) / str(step)
        if manifest.damage(folder, METADATA) is None:
            about = ocp.metadata(folder, "params").custom_metadata or {}
            if about.get("metrics"):
                losses[step] = about["metrics"][VALIDATION_LOSS]
    if not losses:
        raise FileNotFoundError(f"{workdir!r} holds no checkpoint with a validation loss.")
    return min(losses, key=losses.get)
