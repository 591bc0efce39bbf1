"""The results of a comparison as Markdown: a table of speed, and one of quality."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flowhn_jax.compare import scores
from flowhn_jax.compare.training_results import BITS
from flowhn_jax.report.table import markdown

PACKAGES = ("jax", "jaxlib", "flax", "optax")


class _Column(NamedTuple):
    """A column: its key in a model's results, and how the value is written."""

    key: str
    factor: float = 1
    digits: int = 0


_COMMON = {
    "parameters": _Column("parameters"),
    "MFLOPs per token": _Column("train_flops_per_token", 1e-6, 2),
    "train tokens/s": _Column("train_tokens_per_second"),
}
_SPEED = _COMMON | {
    "least": _Column("train_tokens_per_second_min"),
    "most": _Column("train_tokens_per_second_max"),
    "MFU %": _Column("train_mfu", 100, 2),
    "GFLOP/s per device": _Column("train_tflops_per_second_per_device", 1e3, 1),
    "prefill tokens/s": _Column("prefill_tokens_per_second"),
    "decode tokens/s": _Column("decode_tokens_per_second"),
    "memory MiB": _Column("train_memory_bytes", 2**-20),
    "compile s": _Column("compile_seconds", 1, 1),
}
_QUALITY = _COMMON | {
    "seeds": _Column("seeds"),
    "steps": _Column("trained_steps"),
    "tokens": _Column("trained_tokens"),
    "seconds": _Column("trained_seconds", 1, 1),
    "bits/byte": _Column(BITS, 1, 4),
    "late loss": _Column(scores.END_LOSS, 1, 4),
    "recall %": _Column(scores.RECALL, 100, 1),
}


def tables(results: Mapping[str, Any]) -> str:
    """Return the tables, a row per model, each with what it was measured on below it."""
    models, first = results["models"], results["models"][0]
    about = (
        f"{results['size']}: batch {first['batch_size']}, context {first['context']:,}, "
        f"{first['dtype']}, {results['devices']} x {results['device']}; medians of "
        f"{results['rounds']} rounds; memory of the compiled train step; FLOPs of training. "
        f"Recipes {results['config_hash']}, Python {results['python']}, "
        + ", ".join(f"{package} {results[package]}" for package in PACKAGES)
        + "."
    )
    text = f"{_table(_SPEED, models)}\n\n{about}\n"
    if all(row[BITS] is None for row in models):
        return text
    return f"{text}\n{_quality(models)}\n\n{_about_quality(results)}\n"


def _table(columns: Mapping[str, _Column], models: Sequence[Mapping[str, Any]]) -> str:
    rows = [[row["model"], *(_cell(row, each) for each in columns.values())] for row in models]
    return markdown(["model", *columns], rows)


def _quality(models: Sequence[Mapping[str, Any]]) -> str:
    headings = ["model", "learning rate", *_QUALITY]
    rows = [
        [
            row["model"],
            f"{row['learning_rate']:g}",
            *(_cell(row, each) for each in _QUALITY.values()),
        ]
        for row in models
    ]
    return markdown(headings, rows)


def _about_quality(results: Mapping[str, Any]) -> str:
    tokens = {row["trained_tokens"] for row in results["models"]} - {None}
    if results["budget"] is not None:
        trained = f"after {results['budget']}"
    elif len(tokens) == 1:
        trained = f"after {tokens.pop():,} tokens"
    else:
        trained = "of each model"
    text = (
        f"bits/byte on the validation set {trained}; seconds of train steps in the run, without "
        "compilation, validation and checkpoints; late loss: nats per token of the targets with at "
        "least 7/8 of the context before them; recall: right answers to questions of half of a "
        "context."
    )
    if max(row["seeds"] for row in results["models"]) > 1:
        text += " Means ± sample standard deviations over the seeds."
    if len({run["learning_rate"] for run in results["runs"]}) > 1:
        text += " Each model is at its learning rate with the lowest bits/byte."
    return text


def _cell(row: Mapping[str, Any], column: _Column) -> str:
    value, (key, factor, digits) = row[column.key], column
    if value is None:
        return "n/a"
    text = f"{value * factor:,.{digits}f}"
    deviation = row.get(f"{key}_deviation")
    return text if deviation is None else f"{text} ± {deviation * factor:,.{digits}f}"
