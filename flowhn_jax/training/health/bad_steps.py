"""Keeps steps whose loss or gradients were not finite, so that their cause can be found."""

import dataclasses
import json

import jax.numpy as jnp

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.config import Config
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.parallel.distributed import first_before_others, is_first
from flowhn_jax.storage import place
from flowhn_jax.training.health.monitor import TooManySkippedError


def write_debug_workdir(
    workdir: str,
    config: Config,
    state: TrainState,
    batches: TrainBatches,
    skipped: TooManySkippedError,
) -> str:
    """Write the workdir `debug/` of a run whose next steps are the skipped ones.

    It holds a checkpoint from before them, and bad_batches.json with the indices of their training
    windows. All processes must call it.

    Args:
      workdir: folder of the run.
      config: the config of the run.
      state: after the last skipped step; these changed neither parameters nor optimizer.
      batches: the run's, after the same step; their position is the same when the function
        returns.
      skipped: the steps.

    Returns:
      The path of `debug/`.
    """
    folder = place(workdir) / "debug"
    position = batches.get_state()
    first_batch = position["step"] - skipped.count
    with first_before_others("debug folder"):
        if is_first():
            folder.remove_tree()
            folder.make_folder()
            workdir_lib.write_config(str(folder), config)
            first_step = skipped.step - skipped.count + 1
            found = [
                {"step": first_step + i, "windows": batches.windows_of(first_batch + i)}
                for i in range(skipped.count)
            ]
            (folder / "bad_batches.json").write_whole(json.dumps(found, indent=1) + "\n")
    before = dataclasses.replace(
        state,
        step=state.step - skipped.count,
        skipped=state.skipped - skipped.count,
        skipped_in_row=jnp.zeros_like(state.skipped_in_row),
    )
    batches.set_state(position | {"step": first_batch})
    with Checkpoints(str(folder), config) as checkpoints:
        checkpoints.save(before, batches, {})
    batches.set_state(position)
    return str(folder)
