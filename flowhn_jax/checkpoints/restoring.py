"""Reads the state of a run, and its position in the data, from the folder of a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from flowhn_jax.checkpoints.files import AVERAGE, WrongCheckpointError, check_shapes
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.storage import Place

Load = Callable[[dict[str, Any]], Mapping[str, Any]]


def load_state(
    folder: Place, load: Load, abstract: TrainState, data: Any, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    """Return a checkpoint's state, sharded as `abstract`, and its progress.

    If `abstract` has an average and the checkpoint has none, it starts as a copy of the parameters.

    Args:
      folder: the folder of the checkpoint, named by its step.
      load: restores the named parts of the checkpoint to the abstract values in its argument.
      abstract: shapes, dtypes and shardings of the state.
      data: the iterator of the run's batches, which continues from the checkpoint's position.
      log: prints a line for people.

    Raises:
      ValueError: `data` is not what the checkpoint was trained on, or parameters have other shapes.
    """
    step = int(folder.name)
    found = ocp.metadata(str(folder), "params")
    check_shapes(step, found.metadata, abstract.params)
    try:
        load({"data": data})
    except KeyError as error:  # Orbax wraps the error of a checkpointable in it
        if error.__cause__ is None:
            raise
        raise WrongCheckpointError(str(error.__cause__)) from error
    wanted: dict[str, Any] = {
        "params": abstract.params,
        "optimizer": {"step": abstract.step, "opt_state": abstract.opt_state},
    }
    if abstract.ema is not None and (folder / AVERAGE).is_dir():
        wanted[AVERAGE] = abstract.ema
    parts = load(wanted)
    average = parts.get(AVERAGE)
    if abstract.ema is not None and average is None:
        log(
            f"the checkpoint of step {step} has no average (train.ema); it starts as a copy of the "
            "parameters"
        )
        average = _copy(parts["params"])
    progress = progress_of(found)
    counts = {
        name: jax.device_put(jnp.int32(progress.pop(name, 0)), getattr(abstract, name).sharding)
        for name in ("skipped", "skipped_in_row")
    }
    state = TrainState(params=parts["params"], **parts["optimizer"], **counts, ema=average)
    return state, progress


def progress_of(metadata: Any) -> dict[str, Any]:
    """Return the progress in a checkpoint's metadata; early versions wrote none."""
    return (metadata.custom_metadata or {}).get("progress", {})


def _copy(tree: Any) -> Any:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=shardings)(tree)
