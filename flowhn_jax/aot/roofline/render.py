"""Bounds as text: a table, the heaviest operations, and the difference between two steps."""

from collections.abc import Sequence
from typing import Any

from flowhn_jax.aot.roofline.categories import COLLECTIVES
from flowhn_jax.aot.topology import GIB
from flowhn_jax.report.plots import plot_bounds
from flowhn_jax.report.table import markdown

_HEADINGS = ["part of the step", "ms", "products ms", "HBM GB"]
_DIFF_HEADINGS = ["part of the step", "before ms", "after ms", "change"]


def text(step: dict[str, Any]) -> str:
    """Return the tables of a step, as `StepBound.to_dict` returns it."""
    bound = step["bound"]
    rows = [
        [name, *(f"{part[key]:.2f}" for key in ("milliseconds", "flops_milliseconds", "gigabytes"))]
        for name, part in bound["parts"].items()
    ]
    products = sum(part["flops_milliseconds"] for part in bound["parts"].values())
    rows.append(
        ["all", f"{bound['milliseconds']:.2f}", f"{products:.2f}", f"{bound['gigabytes']:.2f}"]
    )
    exposed = bound["parts"].get(COLLECTIVES, {}).get("milliseconds", 0.0)
    chips = ", ".join(f"{name}={n}" for name, n in step["mesh"].items() if n > 1)
    kernels = "their static schedules" if bound["kernels_by_schedule"] else "FLOPs and bytes"
    heaviest = [
        [
            each["source"] or "added by XLA",
            f"{each['milliseconds']:.2f}",
            f"{each['count']:,}",
            each["limit"],
            f"{each['gigabytes']:.2f}",
            each["operation"],
        ]
        for each in bound["heaviest"]
    ]
    return "\n".join(
        [
            f"{step['name']} on {step['topology']}, mesh {chips or 'of one device'}; "
            f"{step['sequences']} sequences of {step['context']:,} tokens per step",
            *(f"{name}={value}" for name, value in step["options"].items()),
            "",
            markdown(_HEADINGS, rows),
            "",
            f"bound {bound['milliseconds']:.2f} ms; the model's FLOPs at the peak "
            f"{bound['model_flops_milliseconds']:.2f} ms: MFU at most "
            f"{100 * bound['mfu_bound']:.1f} %",
            f"HBM {bound['gigabytes']:.2f} GB, {bound['overlapped_gigabytes']:.2f} of them "
            f"overlapped with computation; at least {step['ideal_gigabytes']:.2f} GB are needed",
            f"links {bound['link_milliseconds']:.2f} ms, {exposed:.2f} ms of them exposed"
            if bound["link_milliseconds"]
            else "no collectives",
            f"kernels by {kernels}; memory {step['memory'] / GIB:.2f} of "
            f"{step['memory_limit'] / GIB:.2f} GiB",
            "",
            markdown(
                ["heaviest operations", "ms", "runs", "limit", "HBM GB", "operation"], heaviest
            ),
        ]
    )


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the table of two steps' bounds, as `StepBound.to_dict` returns them."""
    old, new = before["bound"], after["bound"]

    def row(name: str, a: float, b: float) -> list[str]:
        return [name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]

    rows = [
        row(name, old["parts"][name]["milliseconds"], part["milliseconds"])
        for name, part in new["parts"].items()
    ]
    rows += [
        row("all", old["milliseconds"], new["milliseconds"]),
        row("MFU bound, %", 100 * old["mfu_bound"], 100 * new["mfu_bound"]),
        row("HBM, GB", old["gigabytes"], new["gigabytes"]),
        row("memory, GiB", before["memory"] / GIB, after["memory"] / GIB),
    ]
    titles = (f"{name}: {title(step)}" for name, step in (("before", before), ("after", after)))
    return "\n".join([*titles, "", markdown(_DIFF_HEADINGS, rows)])


def draw(steps: Sequence[dict[str, Any]], path: str) -> None:
    """Draw steps, as `StepBound.to_dict` returns them, as stacked bars.

    Args:
      steps: one bar for each, from top to bottom.
      path: the path of the picture; its ending is the format.
    """
    titles = [title(step) for step in steps]
    if len(set(titles)) < len(titles):  # of the same step, before and after a change of the code
        titles = [f"{index + 1}: {each}" for index, each in enumerate(titles)]
    bounds = [step["bound"] for step in steps]
    parts = [
        {name: part["milliseconds"] for name, part in bound["parts"].items()} for bound in bounds
    ]
    ideal = [bound["model_flops_milliseconds"] for bound in bounds]
    plot_bounds(dict(zip(titles, parts, strict=True)), dict(zip(titles, ideal, strict=True)), path)


def title(step: dict[str, Any]) -> str:
    """Return a line that tells a step from others."""
    options = "".join(f", {name}={value}" for name, value in step["options"].items())
    return (
        f"{step['name']} on {step['topology']}, {step['sequences']} x {step['context']:,}{options}"
    )
