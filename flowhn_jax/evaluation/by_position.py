"""How the loss falls with what was read before: where ways of splitting tokens differ."""

import csv
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import Quality
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch, target_weights, token_losses
from flowhn_jax.report.plots import plot_by_position

_FILE = "by_position"


class Curve(NamedTuple):
    """By the number of tokens of its document that a target's window holds before it, from 1 on.

    Attributes:
      nll: [N] float64, nats summed over the targets.
      targets: [N] int64.
    """

    nll: np.ndarray
    targets: np.ndarray

    def quality(self, text_bytes: int) -> Quality:
        """Of all positions together."""
        tokens = int(self.targets.sum())
        return Quality(float(self.nll.sum()) / max(tokens, 1), tokens, text_bytes)


def measure(config: Config, params: Params, batches: Iterable[Batch]) -> Curve:
    """Scores batches as of `models.loss.loss_sum`, position by position."""

    @jax.jit
    def sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        ids = batch["segment_ids"][:, :-1]
        count = ids.shape[1]
        starts = jnp.concatenate((jnp.ones_like(ids[:, :1]), ids[:, 1:] != ids[:, :-1]), axis=1)
        start = jax.lax.cummax(jnp.where(starts != 0, jnp.arange(count), 0), axis=1)
        past = jnp.arange(count) - start  # 0 where the target has one token before it
        weights = target_weights(batch)
        losses = token_losses(config.model, params, batch)
        return tuple(jnp.zeros(count).at[past].add(each) for each in (losses, weights))

    found = jax.device_get([sums(params, batch) for batch in batches])
    nll, targets = (np.sum([each[i] for each in found], axis=0, dtype=np.float64) for i in (0, 1))
    return Curve(nll, np.rint(targets).astype(np.int64))


def write(curve: Curve, name: str, workdir: str) -> str:
    """Writes by_position.csv and by_position.png to the workdir; returns a line that says so."""
    path = pathlib.Path(workdir) / _FILE
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens_before", "nll", "targets"])
        for before, (nll, targets) in enumerate(zip(*curve, strict=True), 1):
            if targets:
                writer.writerow([before, nll / targets, targets])
    plot_by_position({name: curve}, str(path.with_suffix(".png")))
    return f"wrote {path}.csv, .png"
