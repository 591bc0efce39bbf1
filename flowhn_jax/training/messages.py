"""Lines that a run prints at its start, or where there is nothing to start."""

import math

import jax
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.files import versions
from flowhn_jax.checkpoints.optimizer import learning_rate_schedule
from flowhn_jax.config import Config
from flowhn_jax.data.run_data import RunData


def describe_start(config: Config, data: RunData, mesh: Mesh) -> list[str]:
    """Return lines with the versions, the model, the devices and the data of a run."""
    model, device = config.model, mesh.devices.flat[0]
    lines = [
        ", ".join(f"{name} {versions()[name]}" for name in ("flowhn-jax", "jax", "python")),
        f"{models.param_count(model):,} parameters",
        f"{model.name}, context {model.context}, on {mesh.size} x {device.device_kind}",
    ]
    tokenizer = data.tokenizer.spec
    for each in data.training + data.validation:
        splits = each.prepared.splits
        name = f" {each.name}" if each.name else ""
        is_part = data.is_mixture and each.weight
        share = f"{100 * each.weight:.3g} % of the windows, " if is_part else ""
        train = f"{splits['train'].tokens:,} training tokens, " if each.weight else ""
        lines.append(
            f"data{name} {each.prepared.folder}: {share}{train}"
            f"{splits['validation'].tokens:,} validation tokens, tokenizer {tokenizer}"
        )
    if warning := model.warning():
        lines.append(f"warning: {warning}")
    return lines


def schedule_changes(workdir: str, config: Config, step: int, skipped: int) -> list[str]:
    """Return how a changed recipe changes the learning rate of the next step: a line or none.

    Args:
      workdir: folder of the run.
      config: the run's config now.
      step: number of steps done.
      skipped: how many of them were skipped, which the schedule leaves out.
    """
    old, new = (
        jax.numpy.asarray(learning_rate_schedule(train)(step - skipped)).item()
        for train in (workdir_lib.read_config(workdir).train, config.train)
    )
    if math.isclose(old, new, rel_tol=1e-6):
        return []
    train = config.train
    final, peak = f"{train.final_learning_rate:g}", f"{train.learning_rate:g}"
    now = f"ends at step {train.steps:,} with {final} of {peak}"
    if train.schedule == "constant":
        now = f"stays at {peak} after the warm-up"
    return [
        f"the learning rate of step {step + 1:,}: {old:.3g} -> {new:.3g}; the schedule now {now}"
    ]


def nothing_to_train(workdir: str, done: int, steps: int) -> str:
    """Return the line of a run that is complete already."""
    return (
        f"{workdir} is at step {done:,}, and train.steps is {steps:,}: nothing to train. To train "
        f"more steps, raise it, for example --config.train.steps={2 * done}."
    )


def stopped_before_start(reason: str | None) -> str:
    """Return the line of a run that was asked to stop before its state existed."""
    return f"stopped by {reason or 'another process'} before there was anything to save"


def stopped(reason: str | None, step: int) -> str:
    """Return the line of a run that was asked to stop after a step."""
    where = f"at step {step}; the same command continues from here"
    return f"stopped by {reason or 'another process'} {where}"


def ends_early(step: int, newest: int | None) -> str:
    """Return what an error adds: where the run ends, and which checkpoint is its newest, if any."""
    if newest is None:
        return f"the run ends at step {step}; there is no checkpoint of it"
    return (
        f"the run ends at step {step}; its newest checkpoint is that of step {newest}, from which "
        "the same command continues"
    )
