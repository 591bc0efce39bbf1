"""The results of a comparison, one row per model: JSON, CSV, Markdown tables and the figure."""

import csv
import importlib.metadata
import io
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flowhn_jax import flops, models
from flowhn_jax.bench.throughput import tokens_of, work_rate
from flowhn_jax.compare.curves import learning_curves
from flowhn_jax.compare.run_grid import Run
from flowhn_jax.compare.speed import Measurement, config_hash, short_hash
from flowhn_jax.compare.tables import PACKAGES, tables
from flowhn_jax.compare.training_plan import read_budget
from flowhn_jax.compare.training_results import model_result, run_result
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.report.curves_plot import plot_curves
from flowhn_jax.report.plots import plot_comparison
from flowhn_jax.report.table import to_json
from flowhn_jax.storage import place
from flowhn_jax.utils.text import short_path

Results = dict[str, Any]

FILES = ("results.json", "results.csv", "results.md", "figure.png", "figure.svg")
FILES += ("curves.png", "curves.svg")
TIMED = ("train", "prefill", "decode")


def collect(
    configs: Mapping[str, Config],
    runs: Sequence[Run],
    size: str,
    workdir: str,
    measurements: Sequence[Measurement],
) -> Results:
    """Return all results of these models in the workdir.

    Args:
      configs: the configs of the models, by name.
      runs: the training runs of these models, also those that are not in the workdir.
      size: the name of the models' size.
      workdir: the folder of the comparison.
      measurements: the measurements of the models' speed.

    Raises:
      ValueError: a file in the workdir is damaged.
      FileNotFoundError: none of the models has been measured.
    """
    rows = []
    trained = [run_result(run, workdir) for run in runs]
    for name, config in configs.items():
        of_model = [each for each in measurements if each["model"] == name]
        if of_model:
            of_runs = [each for each in trained if each["model"] == name]
            rows.append(_row(name, config, of_model) | model_result(of_runs))
    if not rows:
        raise FileNotFoundError(
            f"{short_path(workdir)} holds no measurements of these models on this device; run the "
            "command without --report_only first."
        )
    budget = read_budget(workdir)
    return {
        "size": size,
        "budget": None if budget is None else budget.describe(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "config_hash": short_hash([row["config_hash"] for row in rows]),
        "rounds": min(row["rounds"] for row in rows),
        "models": rows,
        "runs": trained,
    }


def _row(name: str, config: Config, measurements: Sequence[Measurement]) -> Results:
    """Return what is known of a model without training it."""
    context = config.model.context
    mesh = make_mesh(config.mesh, eval_batch_size(config))
    row = {
        "model": name,
        "kind": config.model.kind,
        "config_hash": config_hash(config),
        "parameters": models.param_count(config.model),
        "batch_size": config.train.batch_size,
        "context": context,
        "train_flops_per_token": flops.train_flops(config.model, context) / context,
        "dtype": str(models.compute_dtype(config.model)),
        "kernels": measurements[0]["kernels"],
        "rounds": len(measurements),
    }
    for timed in TIMED:
        medians = [statistics.median(each["seconds"].get(timed, [0.0])) for each in measurements]
        row |= _speed(timed, [seconds for seconds in medians if seconds], config)
    seconds = tokens_of("train", config) / row["train_tokens_per_second"]
    row |= work_rate("train", seconds, config, mesh)
    row["compile_seconds"] = measurements[0]["compile_seconds"]
    row["train_memory_bytes"] = measurements[0]["memory_bytes"]
    return row


def _speed(timed: str, seconds: list[float], config: Config) -> Results:
    """Return the median, minimum and maximum tokens/s; None where nothing was timed."""
    key = f"{timed}_tokens_per_second"
    if not seconds:
        return {key: None, f"{key}_min": None, f"{key}_max": None}
    rates = sorted(tokens_of(timed, config) / each for each in seconds)
    return {key: statistics.median(rates), f"{key}_min": rates[0], f"{key}_max": rates[-1]}


def write(results: Results, workdir: str) -> None:
    """Write the FILES, curves only of trained models; print tables and, as the last line, JSON."""
    folder, lines = place(workdir), io.StringIO()
    (folder / "results.json").write(json.dumps(results, indent=2) + "\n")
    writer = csv.DictWriter(lines, results["models"][0])
    writer.writeheader()
    writer.writerows(results["models"])
    (folder / "results.csv").write(lines.getvalue())
    text = tables(results)
    (folder / "results.md").write(text)
    title = f"{results['size']}, {results['device']}"
    curves = learning_curves(results["models"], results["runs"], workdir)
    for suffix in ("png", "svg"):
        figure = str(folder / f"figure.{suffix}")
        plot_comparison(results["models"], title, figure, results["budget"])
        if curves:
            plot_curves(curves, title, str(folder / f"curves.{suffix}"))
    print(text)
    more = ", curves.png, .svg" if curves else ""
    print(f"wrote {folder}/results.json, .csv, .md, figure.png, .svg{more}")
    print(to_json(results))
