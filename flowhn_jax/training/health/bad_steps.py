"""What a run leaves of steps whose numbers were not finite, for their cause to be found."""

import json
import pathlib
import shutil

import jax.numpy as jnp

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.state import TrainState
from flowhn_jax.config import Config
from flowhn_jax.data.pipeline import TrainBatches
from flowhn_jax.parallel.distributed import first_before_others, is_first
from flowhn_jax.training.health.monitor import TooManySkipped


def keep(
    workdir: str,
    config: Config,
    state: TrainState,
    batches: TrainBatches,
    skipped: TooManySkipped,
) -> str:
    """Makes the workdir `debug/` of a run that is about to do the skipped steps.

    It holds a checkpoint, whose next batches are those of the steps, and bad_batches.json, the
    indices of their training windows. All processes must call it.

    Args:
      workdir: of the run.
      config: of the run.
      state: behind the last of the skipped steps, which left parameters and optimizer alone.
      batches: behind the same step; in the end they are there again.
      skipped: the steps.

    Returns:
      The folder.
    """
    folder = pathlib.Path(workdir) / "debug"
    position = batches.get_state()
    first_batch = position["step"] - skipped.count
    with first_before_others("debug folder"):
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            workdir_lib.write_config(str(folder), config)
            first_step = skipped.step - skipped.count + 1
            found = [
                {"step": first_step + i, "windows": batches.windows_of(first_batch + i)}
                for i in range(skipped.count)
            ]
            (folder / "bad_batches.json").write_text(json.dumps(found, indent=1) + "\n")
    before = TrainState(
        step=state.step - skipped.count,
        params=state.params,
        opt_state=state.opt_state,
        skipped=state.skipped - skipped.count,
        skipped_in_row=jnp.zeros_like(state.skipped_in_row),
    )
    batches.set_state(position | {"step": first_batch})
    with Checkpoints(str(folder), config) as checkpoints:
        checkpoints.save(before, batches, {})
    batches.set_state(position)
    return str(folder)
