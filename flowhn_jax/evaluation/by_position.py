"""The loss by the number of preceding tokens, which is where the split strategies differ."""

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import BATCHES_IN_FLIGHT, Quality
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch, target_weights, token_losses
from flowhn_jax.report.plots import plot_by_position
from flowhn_jax.storage import place
from flowhn_jax.utils.limits import MAX_POSITIONS

_FILE = "by_position"


class Curve(NamedTuple):
    """Sums over the targets with 1, 2, ..., N tokens of their document before them in the window.

    Attributes:
      nll: [N] float64, sum of the targets' losses in nats.
      squares: [N] float64, sum of the squares of these losses.
      targets: [N] int64, number of targets.
    """

    nll: np.ndarray
    squares: np.ndarray
    targets: np.ndarray

    def quality(self, text_bytes: int) -> Quality:
        """Return the mean over all positions of a text of `text_bytes` bytes."""
        tokens = int(self.targets.sum())
        return Quality(float(self.nll.sum()) / max(tokens, 1), tokens, text_bytes)

    def standard_error(self) -> np.ndarray:
        """Return the standard error of the mean loss at each position, [N] float64.

        Targets count as independent. NaN where there are fewer than two.
        """
        count = np.where(self.targets > 1, self.targets, np.nan)
        variance = (self.squares - self.nll**2 / count) / (count - 1)
        return np.sqrt(np.maximum(variance, 0) / count)


def measure(config: Config, params: Params, batches: Iterable[Batch]) -> Curve:
    """Return the losses of batches, as `models.loss.loss_sum` takes them, by position."""

    @jax.jit
    def sums(params: Params, batch: Batch) -> jax.Array:
        ids = batch["segment_ids"][:, :-1]
        count = ids.shape[1]
        starts = jnp.concatenate((jnp.ones_like(ids[:, :1]), ids[:, 1:] != ids[:, :-1]), axis=1)
        start = jax.lax.cummax(jnp.where(starts != 0, jnp.arange(count), 0), axis=1)
        past = jnp.arange(count) - start  # 0 where the target has one token before it
        weights = target_weights(batch)
        losses = token_losses(config.model, params, batch)
        columns = losses, jnp.square(losses), weights
        return jnp.stack([jnp.zeros(count).at[past].add(column) for column in columns])

    found: list[jax.Array] = []
    for batch in batches:
        found.append(sums(params, batch))
        if len(found) > BATCHES_IN_FLIGHT:
            found[-BATCHES_IN_FLIGHT].block_until_ready()
    nll, squares, targets = np.asarray(jax.device_get(found)).sum(axis=0, dtype=np.float64)
    return Curve(nll, squares, np.rint(targets).astype(np.int64))


def read(workdir: str) -> Curve | None:
    """Return the curve of the by_position.csv in the workdir, if there is one.

    Raises:
      ValueError: the file is damaged.
    """
    path = place(workdir) / f"{_FILE}.csv"
    if not path.is_file():
        return None
    columns = []
    try:
        for row in csv.DictReader(io.StringIO(path.read_text())):
            error = float(row["standard_error"] or 0)
            columns.append(
                (int(row["tokens_before"]), float(row["nll"]), error, int(row["targets"]))
            )
        before, mean, error, targets = map(np.array, zip(*columns, strict=True))
        is_valid = all(map(np.all, (np.diff(before) > 0, before > 0, targets > 0)))
        is_valid = is_valid and before[-1] <= MAX_POSITIONS and np.isfinite([mean, error]).all()
        if not is_valid:
            raise ValueError("the values are not those of a curve")
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as found:
        raise ValueError(
            f"{str(path)!r} is damaged; evaluate the run with --by_position again."
        ) from found
    sums = np.zeros((3, before[-1]))
    # The inverse of `standard_error`.
    squares = error**2 * targets * (targets - 1) + mean**2 * targets
    sums[:, before - 1] = mean * targets, squares, targets
    return Curve(sums[0], sums[1], sums[2].astype(np.int64))


def write(curve: Curve, name: str, workdir: str) -> str:
    """Write by_position.csv and by_position.png to the workdir; return a line that names them."""
    folder, text = place(workdir), io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["tokens_before", "nll", "standard_error", "targets"])
    rows = zip(curve.nll, curve.standard_error(), curve.targets, strict=True)
    for before, (nll, error, targets) in enumerate(rows, 1):
        if targets:
            mean_error = "" if np.isnan(error) else error
            writer.writerow([before, nll / targets, mean_error, targets])
    (folder / f"{_FILE}.csv").write(text.getvalue())
    plot_by_position({name: curve}, str(folder / f"{_FILE}.png"))
    return f"wrote {folder / _FILE}.csv, .png"
