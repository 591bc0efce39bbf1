"""The results of a sweep: a row per point, means over the seeds, a Markdown table and a figure."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from flowhn_jax.checkpoints.rows import number, read_rows
from flowhn_jax.config import Config
from flowhn_jax.report.sweep_plot import plot_sweep
from flowhn_jax.report.table import markdown, to_json
from flowhn_jax.storage import place
from flowhn_jax.sweep.grid import Point

Results = dict[str, Any]

FILES = ("sweep.json", "sweep.md", "sweep.png")
SEED = "train.seed"
_BITS = "validation_bits_per_byte"
_BEST = f"best_{_BITS}"
_RATE = "tokens_per_second"
_COLUMNS = {_BITS: ("final bits/byte", 4), _BEST: ("best bits/byte", 4), _RATE: ("tokens/s", 0)}


def point_row(point: Point, config: Config, workdir: str, failure: str | None) -> Results:
    """Return the results of a point: its values, and those of its run where it has them.

    Args:
      point: the point of the grid.
      config: the config of the point.
      workdir: the folder of the sweep.
      failure: the message of the run, if it failed.
    """
    rows = [] if failure is not None else read_rows(place(workdir) / point.name)
    scored = [(bits, row["step"]) for row in rows if (bits := number(row, _BITS)) is not None]
    best, best_step = min(scored, default=(None, None))
    rates = [rate for row in rows if (rate := number(row, _RATE)) is not None]
    step = rows[-1]["step"] if rows else 0
    is_final = bool(scored) and scored[-1][1] == config.train.steps
    return {
        "name": point.name,
        **{key: _typed(value) for key, value in point.values.items()},
        "step": step,
        "steps": config.train.steps,
        _BITS: scored[-1][0] if is_final else None,
        _BEST: best,
        "best_step": best_step,
        _RATE: statistics.median(rates) if rates else None,
        "error": failure,
    }


def _typed(text: str) -> int | float | str:
    """Return a value of the grid as a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def collect(
    points: Sequence[Point], configs: Sequence[Config], workdir: str, failures: Mapping[str, str]
) -> Results:
    """Return all results of a sweep; means where the grid has several seeds."""
    rows = [
        point_row(point, config, workdir, failures.get(point.name))
        for point, config in zip(points, configs, strict=True)
    ]
    keys = list(points[0].values)
    return {
        "keys": keys,
        "device": jax.devices()[0].device_kind,
        "points": rows,
        "means": _means(rows, keys) if SEED in keys else [],
    }


def _means(rows: Sequence[Results], keys: Sequence[str]) -> list[Results]:
    """Return the mean and the sample deviation over the seeds, by the values of the other keys."""
    others = [key for key in keys if key != SEED]
    groups: dict[tuple, list[Results]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in others), []).append(row)
    found = []
    for values, group in groups.items():
        mean: Results = dict(zip(others, values, strict=True))
        mean["runs"] = sum(row[_BITS] is not None for row in group)
        for column in _COLUMNS:
            known = [row[column] for row in group if row[_BITS] is not None]
            known = [value for value in known if value is not None]
            mean[column] = statistics.fmean(known) if known else None
            has_deviation = len(known) > 1
            mean[f"{column}_deviation"] = statistics.stdev(known) if has_deviation else None
        found.append(mean)
    return found


def tables(results: Results) -> str:
    """Return the points, and the means over the seeds if there are any, as Markdown."""
    keys = results["keys"]
    rows = [
        [
            *(str(row[key]) for key in keys),
            *(_cell(row[column], digits) for column, (_, digits) in _COLUMNS.items()),
            _state(row),
        ]
        for row in results["points"]
    ]
    headings = [heading for heading, _ in _COLUMNS.values()]
    text = markdown([*keys, *headings, "state"], rows) + "\n"
    if not results["means"]:
        return text
    others = [key for key in keys if key != SEED]
    means = [
        [
            *(str(mean[key]) for key in others),
            str(mean["runs"]),
            *(
                _cell(mean[column], digits) + _deviation(mean[f"{column}_deviation"], digits)
                for column, (_, digits) in _COLUMNS.items()
            ),
        ]
        for mean in results["means"]
    ]
    about = "Mean ± sample standard deviation over the seeds that ended:"
    return f"{text}\n{about}\n\n{markdown([*others, 'seeds', *headings], means)}\n"


def _state(row: Results) -> str:
    if row["error"] is not None:
        return "failed: " + row["error"].replace("|", "\\|")
    is_done = row["step"] == row["steps"]
    return "done" if is_done else f"step {row['step']:,} of {row['steps']:,}"


def _cell(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:,.{digits}f}"


def _deviation(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:,.{digits}f}"


def write(results: Results, workdir: str) -> None:
    """Write all FILES; print the tables and, as the last line, the results as JSON."""
    folder, text = place(workdir), tables(results)
    (folder / "sweep.json").write(json.dumps(results, indent=2) + "\n")
    (folder / "sweep.md").write(text)
    print(text)
    plot_sweep(results["points"], results["keys"], str(folder / "sweep.png"))
    print(f"wrote {folder}/sweep.json, sweep.md, sweep.png")
    print(to_json(results))
