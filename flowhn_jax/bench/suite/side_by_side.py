"""`bench suite --compare A B`: two results next to each other, with ratios and a figure."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite.document import read, write
from flowhn_jax.bench.suite.figures import draw_ratios
from flowhn_jax.bench.suite.kernel_speed import ratios
from flowhn_jax.report.table import markdown, to_json
from flowhn_jax.utils.text import short_path

PAGE, FIGURE, DATA = "comparison.md", "comparison.png", "comparison.json"


class Measurement(NamedTuple):
    """A number of one result, to compare with the same number of another one."""

    part: str
    name: str
    unit: str
    value: float
    more_is_better: bool


def compare(a: str, b: str, out: str) -> list[dict[str, Any]]:
    """Print and write a comparison of B with A; return a row for each number that both have.

    `ratio` is above 1 if B is better: more per second, fewer seconds, a smaller error. It is None
    where it is undefined. The files comparison.md, .json and .png are written to the folder `out`.

    Raises:
      FileNotFoundError: a folder has no results.
      ValueError: a suite.json is damaged, or the results have no measurement in common.
    """
    documents = [read(pathlib.Path(name)) for name in (a, b)]
    of_a, of_b = (
        {(f.part, f.name): f for f in measurements(document["parts"])} for document in documents
    )
    rows = [
        {
            "part": first.part,
            "name": first.name,
            "unit": first.unit,
            "a": first.value,
            "b": of_b[key].value,
            "ratio": _ratio(first, of_b[key]),
        }
        for key, first in of_a.items()
        if key in of_b
    ]
    if not rows:
        raise ValueError(
            f"--compare needs results with a measurement in common; {short_path(a)} and "
            f"{short_path(b)} have none. Run `bench suite` for longer in both folders."
        )
    text = _page(a, b, documents, rows)
    print(text)
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / PAGE, text.encode())
    write(folder / DATA, (to_json({"a": a, "b": b, "rows": rows}, indent=1) + "\n").encode())
    write(folder / FIGURE, draw_ratios(rows, f"{b} compared with {a}"))
    print(f"wrote {folder}/{PAGE}, {DATA}, {FIGURE}")
    return rows


def _ratio(a: Measurement, b: Measurement) -> float | None:
    above, below = (b.value, a.value) if a.more_is_better else (a.value, b.value)
    if not below or (math.isinf(above) and math.isinf(below)):
        return None
    return above / below


def measurements(parts: Mapping[str, Any]) -> Iterator[Measurement]:
    """Yield the numbers of a result that can be compared with those of another one."""
    rows: dict[str, Sequence[Row]] = {name: part["rows"] for name, part in parts.items()}
    for row in rows.get("machine", ()):
        for name in ("bytes_per_second", "matmul_flops_per_second", "exps_per_second"):
            if name in row:
                what = f"{name.replace('_', ' ')}, {row['dtype']}"
                yield Measurement("machine", what, "G/s", row[name] / 1e9, True)
    for row in rows.get("accuracy", ()):
        if "right" in row:
            # An error is None if it is not finite; without gradients there is no worst_gradient.
            gradients = row["gradient_error"] if row["worst_gradient"] else 0.0
            errors = [math.inf if error is None else error for error in (row["error"], gradients)]
            yield Measurement("accuracy", row["key"], "error", max(errors), False)
    for row in rows.get("training", ()):
        if "tokens_per_second" in row:
            yield Measurement("training", row["key"], "tokens/s", row["tokens_per_second"], True)
    for row in rows.get("kernel_speed", ()):
        for each in row.get("measurements", ()):
            if each.get("both_ms") is not None:
                what = f"{each['operation']} {each['shape']} {each['backend']}"
                yield Measurement(
                    "kernels, forward and backward", what, "ms", each["both_ms"], False
                )
    for what, row in ratios(rows.get("kernel_speed", ())):
        yield Measurement("against the authors' code", what, "times", row["ratio"], True)
    for row in rows.get("inference", ()):
        for name in ("prefill", "decode"):
            if value := row.get(f"{name}_tokens_per_second"):
                yield Measurement("inference", f"{name} {row['key']}", "tokens/s", value, True)
    for row in rows.get("learning", ()):
        if row.get("losses") and row["losses"][-1] is not None:
            what = f"loss at step {len(row['losses'])}, {row['key']}"
            yield Measurement("learning", what, "nats per token", row["losses"][-1], False)


def _page(a: str, b: str, documents: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    lines = [f"# {b} compared with {a}", ""]
    machines = [document["machine"] or {} for document in documents]
    about = [
        [key, str(machines[0].get(key)), str(machines[1].get(key))]
        for key in ("device", "devices", "python")
    ]
    names = sorted({name for machine in machines for name in machine.get("packages", {})})
    about += [
        [name, *(machine.get("packages", {}).get(name, "none") for machine in machines)]
        for name in names
    ]
    about.append(["code", *(document["code"] for document in documents)])
    lines += [markdown(["", a, b], about), "", "A ratio above 1 means that B is better.", ""]
    table = [
        [
            row["part"],
            row["name"],
            f"{row['a']:,.4g}",
            f"{row['b']:,.4g}",
            row["unit"],
            "n/a" if row["ratio"] is None else f"{row['ratio']:.3f}",
        ]
        for row in rows
    ]
    lines.append(markdown(["part", "measurement", "A", "B", "unit", "ratio"], table))
    return "\n".join(lines) + "\n"
