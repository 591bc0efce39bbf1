"""What the training runs of a comparison led to, and each model's mean at its best rate."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flowhn_jax.checkpoints.rows import Row, elapsed_seconds, read_rows
from flowhn_jax.compare import scores
from flowhn_jax.compare.run_grid import Run
from flowhn_jax.compare.speed import is_number
from flowhn_jax.compare.training_data import CORPUS
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.text import short_path, short_repr

Result = dict[str, Any]

BITS = "validation_bits_per_byte"
_AVERAGED = ("trained_steps", "trained_tokens", "trained_seconds", "validation_loss")
_COMPARED = (BITS, *scores.KEYS)  # have a deviation


def run_result(run: Run, workdir: str) -> Result:
    """Return a run's results at its last validation; values are None without one.

    Raises:
      ValueError: a value in the run's metrics.jsonl is not a number, or its scores are damaged.
    """
    folder = place(workdir) / run.name
    rows = read_rows(folder)
    scored = [index for index, row in enumerate(rows) if "validation_loss" in row]
    last, seconds = {}, None
    if scored:
        last, seconds = rows[scored[-1]], elapsed_seconds(rows)[scored[-1]]
    return {
        **run._asdict(),
        "trained_steps": last.get("step"),
        "trained_tokens": _number(last, "tokens", folder),
        "trained_seconds": seconds,
        "validation_loss": _number(last, _of_corpus(last, "validation_loss"), folder),
        BITS: _number(last, _of_corpus(last, BITS), folder),
        **scores.read(str(folder)),
    }


def _of_corpus(row: Row, key: str) -> str:
    """Return the key of a row's value on the corpus alone, if it also has that of a mixture."""
    return f"{key}/{CORPUS}" if f"{key}/{CORPUS}" in row else key


def _number(row: Row, key: str, folder: Place) -> float | None:
    """Return a number of a row; None if the row has none.

    Raises:
      ValueError: it is something else.
    """
    value = row.get(key)
    if value is not None and not is_number(value):
        raise ValueError(
            f"{short_path(str(folder))}: {key} in metrics.jsonl must be a number; got "
            f"{short_repr(value)}. Remove the folder to train this model again."
        )
    return value


def model_result(results: Iterable[Result]) -> Result:
    """Return the result of a model: means over the seeds at its best learning rate.

    The best is the one with the lowest mean of the validation bits per byte, of the seeds that
    ended. Deviations are those of a sample, None for fewer than two seeds.

    Args:
      results: the results of the model's runs, at least one.
    """
    by_rate: dict[float, list[Result]] = {}
    for result in results:
        by_rate.setdefault(result["learning_rate"], []).append(result)
    ended = {
        rate: [each for each in runs if each[BITS] is not None] for rate, runs in by_rate.items()
    }
    means = {
        rate: statistics.fmean(each[BITS] for each in runs) for rate, runs in ended.items() if runs
    }
    best = min(means, key=means.__getitem__) if means else next(iter(by_rate))
    found: Result = {"learning_rate": best, "seeds": len(ended[best])}
    for key in _AVERAGED + _COMPARED:
        values = [each[key] for each in ended[best] if each[key] is not None]
        found[key] = _mean(values)
        if key in _COMPARED:
            found[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return found


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean; equal values are returned as they are, so that integers stay integers."""
    if not values:
        return None
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)


def best_runs(
    models: Iterable[Mapping[str, Any]], runs: Iterable[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Return the names of the runs at each model's best learning rate that ended."""
    rates = {model["model"]: model["learning_rate"] for model in models}
    found: dict[str, list[str]] = {}
    for run in runs:
        if run[BITS] is not None and run["learning_rate"] == rates.get(run["model"]):
            found.setdefault(run["model"], []).append(run["name"])
    return found
