"""The results of a comparison, one row per model: JSON, CSV, a Markdown table and the figure."""

import csv
import importlib.metadata
import io
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flowhn_jax import models
from flowhn_jax.bench.throughput import tokens_of, work_rate
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.compare.speed import Measurement, config_hash, is_number, short_hash
from flowhn_jax.config import Config
from flowhn_jax.evaluation.perplexity import eval_batch_size
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.report.plots import plot_comparison
from flowhn_jax.report.table import markdown, to_json
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.text import short_path, short_repr

Results = dict[str, Any]

FILES = ("results.json", "results.csv", "results.md", "figure.png", "figure.svg")
TIMED = ("train", "prefill", "decode")
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_COLUMNS = {  # of the table: heading -> key, factor, digits
    "parameters": ("parameters", 1, 0),
    "train tokens/s": ("train_tokens_per_second", 1, 0),
    "min": ("train_tokens_per_second_min", 1, 0),
    "max": ("train_tokens_per_second_max", 1, 0),
    "MFU %": ("train_mfu", 100, 2),
    "GFLOP/s per device": ("train_tflops_per_second_per_device", 1e3, 1),
    "prefill tokens/s": ("prefill_tokens_per_second", 1, 0),
    "decode tokens/s": ("decode_tokens_per_second", 1, 0),
    "memory MiB": ("train_memory_bytes", 2**-20, 0),
    "compile s": ("compile_seconds", 1, 1),
    "bits/byte": ("validation_bits_per_byte", 1, 4),
}


def collect(
    configs: Mapping[str, Config], size: str, workdir: str, measurements: Sequence[Measurement]
) -> Results:
    """Return all results of these models in the workdir.

    Raises:
      FileNotFoundError: none of the models has been measured.
    """
    rows = []
    for name, config in configs.items():
        of_model = [each for each in measurements if each["model"] == name]
        if of_model:
            rows.append(_row(name, config, workdir, of_model))
    if not rows:
        raise FileNotFoundError(
            f"{short_path(workdir)} holds no measurements of these models on this device; run the "
            "command without --report_only first."
        )
    return {
        "size": size,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
        "config_hash": short_hash([row["config_hash"] for row in rows]),
        "rounds": min(row["rounds"] for row in rows),
        "models": rows,
    }


def _row(name: str, config: Config, workdir: str, measurements: Sequence[Measurement]) -> Results:
    mesh = make_mesh(config.mesh, eval_batch_size(config))
    row = {
        "model": name,
        "config_hash": config_hash(config),
        "parameters": models.param_count(config.model),
        "batch_size": config.train.batch_size,
        "context": config.model.context,
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
    row |= _validation(place(workdir) / name)
    return row


def _validation(folder: Place) -> Results:
    """Return a run's last validation and the tokens trained before it; None where there is none.

    Raises:
      ValueError: a value in the run's metrics.jsonl is not a number.
    """
    scored = [row for row in read_rows(folder) if "validation_loss" in row]
    last = scored[-1] if scored else {}
    found = {"trained_tokens": last.get("tokens")}
    found |= {key: last.get(key) for key in ("validation_loss", "validation_bits_per_byte")}
    for key, value in found.items():
        if value is not None and not is_number(value):
            raise ValueError(
                f"{short_path(str(folder))}: {key} in metrics.jsonl must be a number; got "
                f"{short_repr(value)}. Remove the folder to train this model again."
            )
    return found


def _speed(timed: str, seconds: list[float], config: Config) -> Results:
    """Return the median, minimum and maximum tokens/s; None where nothing was timed."""
    key = f"{timed}_tokens_per_second"
    if not seconds:
        return {key: None, f"{key}_min": None, f"{key}_max": None}
    rates = sorted(tokens_of(timed, config) / each for each in seconds)
    return {key: statistics.median(rates), f"{key}_min": rates[0], f"{key}_max": rates[-1]}


def table(results: Results) -> str:
    """Return the paper's table in Markdown, a row per model, with the setup described below it."""
    rows = [
        [row["model"], *(_cell(row[key], *form) for key, *form in _COLUMNS.values())]
        for row in results["models"]
    ]
    tokens = {row["trained_tokens"] for row in results["models"]} - {None}
    trained = " and ".join(f"{count:,}" for count in sorted(tokens)) or "no"
    first = results["models"][0]
    about = (
        f"{results['size']}: batch {first['batch_size']}, context {first['context']:,}, "
        f"{first['dtype']}, {results['devices']} x {results['device']}; medians of "
        f"{results['rounds']} rounds; bits/byte on the validation set after {trained} tokens; "
        f"memory of the compiled train step. Recipes {results['config_hash']}, "
        f"Python {results['python']}, "
        + ", ".join(f"{package} {results[package]}" for package in _PACKAGES)
        + "."
    )
    return f"{markdown(['model', *_COLUMNS], rows)}\n\n{about}\n"


def _cell(value: float | None, factor: float, digits: int) -> str:
    return "n/a" if value is None else f"{value * factor:,.{digits}f}"


def write(results: Results, workdir: str) -> None:
    """Write all FILES; print the table and, as the last line, the results as JSON."""
    folder, lines = place(workdir), io.StringIO()
    (folder / "results.json").write(json.dumps(results, indent=2) + "\n")
    writer = csv.DictWriter(lines, results["models"][0])
    writer.writeheader()
    writer.writerows(results["models"])
    (folder / "results.csv").write(lines.getvalue())
    text = table(results)
    (folder / "results.md").write(text)
    for suffix in ("png", "svg"):
        plot_comparison(results["models"], f"{results['size']}, {results['device']}",
                    str(folder / f"figure.{suffix}"))  # fmt: skip
    print(text)
    print(f"wrote {folder}/results.json, .csv, .md, figure.png, .svg")
    print(to_json(results))
