"""The validation losses of a run's checkpoints, and which checkpoint is the best."""

import contextlib
from collections.abc import Mapping
from typing import Any

from flowhn_jax.checkpoints.rows import Row, number, read_rows

# Keys of a row, and of a checkpoint's metrics: the loss of the parameters, and that of their
# average (train.ema); those on the set NAME have /NAME at the end.
VALIDATION_LOSS, AVERAGE_LOSS = LOSSES = "validation_loss", "validation_ema_loss"


def loss_key(best_by: str, *, ema: bool = False) -> str:
    """Return the key of the loss that decides which checkpoint is the best; see `train.best_by`.

    With `ema` it is that of the average of the parameters.
    """
    loss = AVERAGE_LOSS if ema else VALIDATION_LOSS
    return f"{loss}/{best_by}" if best_by else loss


def validations(workdir: str, metrics: Mapping[int, Any]) -> dict[int, Row]:
    """Return the validation of each checkpoint by its step: its own metrics, or else its row.

    A run that was stopped before a validation makes up for it when it is resumed: only the row of
    that step then has the losses.

    Args:
      workdir: the workdir of the run.
      metrics: what each checkpoint holds of its validation, by step: a mapping or None.
    """
    rows: dict[int, Row] = {}
    if not all(metrics.values()):
        with contextlib.suppress(ValueError):  # damaged rows; the checkpoints hold most losses
            rows = {row["step"]: row for row in read_rows(workdir)}
    return {step: held or rows.get(step, {}) for step, held in metrics.items()}


def best_step(validations: Mapping[int, Row], key: str) -> int | None:
    """Return the step with the lowest loss, the newest of equal ones; None if none has this key."""
    losses = {step: number(found, key) for step, found in validations.items()}
    known = [(loss, -step) for step, loss in losses.items() if loss is not None]
    return -min(known)[1] if known else None
