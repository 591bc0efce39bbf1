"""The learning curves of a comparison, from the rows of its runs."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flowhn_jax.checkpoints.rows import elapsed_seconds, number, read_rows
from flowhn_jax.compare.training_results import best_runs
from flowhn_jax.report.curves_plot import LearningCurve
from flowhn_jax.storage import Place, place


def learning_curves(
    models: Iterable[Mapping[str, Any]], runs: Iterable[Mapping[str, Any]], workdir: str
) -> dict[str, LearningCurve]:
    """Return the curve of each trained model, the mean over its seeds at its best learning rate.

    Args:
      models: results of the models.
      runs: results of the runs.
      workdir: the folder of the comparison.
    """
    models = list(models)
    names = best_runs(models, runs)
    curves = {}
    for model in models:
        found = [_rows(place(workdir) / name) for name in names.get(model["model"], ())]
        steps = sorted(set[int]().union(*found).intersection(*found))
        if steps:
            mean = np.mean([[rows[step] for step in steps] for rows in found], axis=0)
            seconds, tokens, loss = mean.T
            flops = tokens * model["train_flops_per_token"]
            curves[model["model"]] = LearningCurve(model["kind"], seconds, flops, loss)
    return curves


def _rows(folder: Place) -> dict[int, tuple[float, float, float]]:
    """Return seconds, tokens and loss at each step of a run that has a row with all of them."""
    rows = read_rows(folder)
    found = {}
    for row, seconds in zip(rows, elapsed_seconds(rows), strict=True):
        tokens, loss = number(row, "tokens"), number(row, "loss")
        if seconds is not None and tokens is not None and loss is not None:
            found[row["step"]] = seconds, tokens, loss
    return found
