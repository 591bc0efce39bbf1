"""suite.md: the results as tables; wrong numbers come first, then what is missing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite.document import Document
from flowhn_jax.bench.suite.kernel_speed import ratios
from flowhn_jax.bench.suite.learning import largest_difference, smoothed
from flowhn_jax.bench.suite.parts import Part
from flowhn_jax.report.table import markdown

_STEPS_SHOWN = (20, 50, 100, 150, 200)


def render(document: Document, parts: Sequence[Part], figures: Sequence[str]) -> str:
    """Return the page.

    Args:
      document: the results.
      parts: the parts of the suite, in their order.
      figures: names of the image files to show at the end.
    """
    rows = document.rows()
    machine = document.content["machine"] or {}
    title = f"# FlowHN on {machine.get('devices', '?')} x {machine.get('device', '?')}"
    seconds = document.content["seconds"]
    lines = [title, "", f"Measured in {seconds / 60:.1f} minutes; code {document.content['code']}."]
    if wrong := wrong_rows(rows):
        lines += ["", "## 🔴 Wrong numbers", "", _accuracy(wrong)]
    if missing := missing_lines(document, parts):
        lines += ["", "## Missing", "", *(f"- {line}" for line in missing)]
    for part in parts:
        if of_part := rows.get(part.name):
            lines += ["", f"## {part.title}", "", _SECTIONS[part.name](of_part)]
            lines += [""] + [
                f"- {row['key']} {kind}: {row[kind]}"
                for row in of_part
                for kind in ("failed", "unserved")
                if kind in row
            ]
    for name in figures:
        lines += ["", f"![{name.partition('.')[0]}]({name})"]
    return "\n".join(lines) + "\n"


def wrong_rows(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return the rows of kernels whose numbers are wrong."""
    return [row for row in rows.get("accuracy", ()) if row.get("right") is False]


def missing_lines(document: Document, parts: Sequence[Part]) -> list[str]:
    """Return a line for each incomplete part: which of its rows are missing."""
    lines = []
    for part in parts:
        keys = document.missing(part.name)
        if failed := document.part(part.name)["failed"]:
            lines.append(f"{part.title}: failed: {failed}")
        elif keys is None:
            lines.append(f"{part.title}: all of it")
        elif keys:
            shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
            lines.append(f"{part.title}: {shown}")
    return lines


def number(value: Any, form: str = "{:,.0f}", factor: float = 1) -> str:
    """Return a number as text, 'n/a' for None."""
    return "n/a" if value is None else form.format(value * factor)


def _machine(rows: Sequence[Row]) -> str:
    table = []
    for row in rows:
        if row["key"] == "device" and "device" in row:
            packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
            table += [
                ["device", f"{row['devices']} x {row['device']}"],
                ["device memory", number(row["memory_bytes"], "{:.1f} GiB", 2**-30)],
                ["driver", row["driver"] or "n/a"],
                ["runtime", row["runtime"]],
                ["host", f"{row['processor']}, {row['cores']} cores, "
                         f"{row['host_memory_bytes'] / 2**30:.0f} GiB, {row['host']}"],
                ["software", f"Python {row['python']}, {packages}"],
            ]  # fmt: skip
        elif "bytes_per_second" in row:
            table += [
                [f"copies, {row['dtype']}", number(row["bytes_per_second"], "{:,.0f} GB/s", 1e-9)],
                [
                    f"matrix products, {row['dtype']}",
                    number(row["matmul_flops_per_second"], "{:,.2f} TFLOP/s", 1e-12),
                ],
                ["exponentials, float32", number(row["exps_per_second"], "{:,.1f} G/s", 1e-9)],
            ]
    return markdown(["", "measured or reported"], table)


def _accuracy(rows: Sequence[Row]) -> str:
    table = [
        [
            row["check"],
            row["backend"],
            row["dtype"],
            number(row["error"], "{:.1e}"),
            number(row["gradient_error"], "{:.1e}"),
            row["worst_gradient"] or "",
            number(row["tolerance"], "{:.0e}"),
            "right" if row["right"] else "**WRONG**",
        ]
        for row in rows
        if "right" in row
    ]
    headings = [
        "operation",
        "backend",
        "dtype",
        "error",
        "gradient error",
        "worst gradient",
        "tolerance",
        "",
    ]
    return markdown(headings, table)


def _compilation(rows: Sequence[Row]) -> str:
    total = sum(row.get("compile_seconds", 0.0) for row in rows)
    return f"{len(rows)} programs, {total:.0f} s in total over all threads."


def _training(rows: Sequence[Row]) -> str:
    whole = {row["size"]: row["tokens_per_second"] for row in rows if _is_no_split(row)}
    table = []
    for row in rows:
        if "tokens_per_second" not in row:
            continue
        base = whole.get(row["size"])
        step = f"{1e3 * row['step_seconds']:,.1f}"
        spread = f"{1e3 * row['step_seconds_min']:,.1f} to {1e3 * row['step_seconds_max']:,.1f}"
        table.append(
            [
                f"{row['size']} {row['model']}",
                number(row["parameters"]),
                f"{row['batch_size']} ({row['batch_limit']})",
                number(row["tokens_per_second"]),
                number(base and row["tokens_per_second"] / base, "{:.2f}"),
                number(row["train_mfu"], "{:.1f}", 100),
                f"{row['train_tflops_per_second_per_device']:,.2f}",
                f"{step} ({spread})",
                number(row.get("bound_seconds"), "{:,.1f}", 1e3),
                f"{row['memory_bytes'] / 2**30:,.2f}",
                f"{row['compile_seconds']:.1f}",
                row["kernels"],
            ]
        )
    headings = ["model", "parameters", "batch (limit)", "tokens/s", "x no_split", "MFU %",
                "TFLOP/s per device", "ms per step", "bound ms", "GiB", "compile s",
                "kernels"]  # fmt: skip
    return markdown(headings, table)


def _is_no_split(row: Row) -> bool:
    return row.get("model") == "no_split" and "tokens_per_second" in row


def _kernel_speed(rows: Sequence[Row]) -> str:
    table = [
        [
            f"{each['operation']} {each['size']}",
            each["shape"],
            each["backend"],
            *(
                number(each.get(key), form)
                for key, form in (
                    ("forward_ms", "{:,.3f}"),
                    ("forward_ratio", "{:,.1f}"),
                    ("both_ms", "{:,.3f}"),
                    ("both_ratio", "{:,.1f}"),
                    ("temporary_mib", "{:,.0f}"),
                    ("forward_error", "{:.0e}"),
                    ("both_error", "{:.0e}"),
                )
            ),
            each.get("failed", ""),
        ]
        for row in rows
        for each in row.get("measurements", ())
    ]
    headings = ["operation", "shape", "backend or peer", "forward ms", "x floor",
                "fwd+bwd ms", "x floor", "temp MiB", "error", "grad error", ""]  # fmt: skip
    sections = [markdown(headings, table)] if table else []
    authors = [
        [
            what,
            f"{1e3 * row['seconds']:,.2f}",
            f"{1e3 * row['authors_seconds']:,.2f}",
            f"{row['ratio']:,.2f}",
        ]
        for what, row in ratios(rows)
    ]
    if authors:
        kernels = next(row["authors_kernels"] for row in rows if "authors_kernels" in row)
        headings = ["compared with the authors' code", "ours, ms", "theirs, ms", "speedup"]
        sections += [markdown(headings, authors), f"Kernels of the authors' code: {kernels}."]
    return "\n\n".join(sections)


def _step_costs(rows: Sequence[Row]) -> str:
    sections = []
    for row in rows:
        if "costs" not in row:
            continue
        table = [
            [
                cost["operation"] or cost["name"],
                cost["source"],
                f"{100 * cost['share']:.1f}",
                f"{1e3 * cost['seconds']:,.3f}",
                number(cost["count"]),
                cost["name"],
            ]
            for cost in row["costs"]
        ]
        headings = ["operation", "source", "%", "ms per step", "count", "instruction"]
        title = f"{row['key']}, batch {row['batch_size']}, {1e3 * row['seconds']:,.2f} ms per step:"
        sections.append(f"{title}\n\n{markdown(headings, table)}")
    return "\n\n".join(sections)


def _inference(rows: Sequence[Row]) -> str:
    table = [
        [
            f"{row['size']} {row['model']}",
            str(row["batch_size"]),
            number(row["prefill_tokens_per_second"]),
            number(row["decode_tokens_per_second"]),
            number(row["first_token_seconds"], "{:,.2f}", 1e3),
            number(row["decode_one_tokens_per_second"]),
            number(row["decode_bandwidth_utilisation"], "{:.1f}", 100),
        ]
        for row in rows
        if "prefill_tokens_per_second" in row
    ]
    headings = ["model", "batch", "prefill tokens/s", "decode tokens/s", "first token ms, batch 1",
                "decode tokens/s, batch 1", "memory bandwidth %"]  # fmt: skip
    return markdown(headings, table)


def _tiles(rows: Sequence[Row]) -> str:
    table = []
    for row in rows:
        for tile, seconds in sorted(row.get("seconds", {}).items(), key=lambda item: item[1]):
            fastest = seconds == min(row["seconds"].values())
            marks = ["chosen"] * fastest + ["default"] * (tile == row["default"])
            table.append([row["key"], row["shape"], tile, f"{1e3 * seconds:.3f}", ", ".join(marks)])
    text = markdown(["scan", "shape", "tile", "forward and backward ms", ""], table)
    return text + (
        "\n\nShapes are [B, L, E] and tiles tokens x channels x warps for the selective scan, "
        "[B, L, H, P] and tokens x warps for SSD."
    )


def _learning(rows: Sequence[Row]) -> str:
    curves = [(row["key"], np.array(row["losses"], float)) for row in rows if "losses" in row]
    table = []
    for step in _STEPS_SHOWN:
        cells = [
            f"{smoothed(losses[:step])[-1]:.4f}" if len(losses) >= step else "n/a"
            for _, losses in curves
        ]
        table.append([str(step), *cells])
    text = markdown(["step", *(f"loss in {key}" for key, _ in curves)], table)
    difference = largest_difference(rows)
    if difference is not None:
        text += f"\n\nLosses are means of 20 steps; the curves differ by at most {difference:.4f}."
    return text


def _rehearsal(rows: Sequence[Row]) -> str:
    table = [
        [
            row["key"],
            str(row.get("batch_size", "")),
            f"{row['seconds']:.1f}",
            f"{row['memory_bytes'] / 2**30:,.2f}",
            "" if row.get("fits", True) else "does not fit",
            row.get("kernels", ""),
        ]
        for row in rows
        if "seconds" in row
    ]
    headings = ["program", "batch", "compile s", "GiB", "", "kernels"]
    return markdown(headings, table)


_SECTIONS: dict[str, Callable[[Sequence[Row]], str]] = {
    "machine": _machine,
    "accuracy": _accuracy,
    "compilation": _compilation,
    "training": _training,
    "kernel_speed": _kernel_speed,
    "step_costs": _step_costs,
    "inference": _inference,
    "tiles": _tiles,
    "learning": _learning,
    "rehearsal": _rehearsal,
}
