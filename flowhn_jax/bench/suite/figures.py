"""The suite's figures: at most four PNG files, one per part."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flowhn_jax.bench.attempt import Row
from flowhn_jax.bench.suite.learning import smoothed
from flowhn_jax.config import BASELINES
from flowhn_jax.report.plots import load_pyplot

_FLOWHN, _OTHER, _SECOND = "#2a78d6", "#b5bcc6", "#eb6834"


def draw(rows: Mapping[str, Sequence[Row]]) -> dict[str, bytes]:
    """Return the PNG files by name, for the parts that have something to draw.

    Raises:
      ImportError: matplotlib is not installed.
    """
    found = {}
    for part, (name, plot) in _FIGURES.items():
        of_part = [row for row in rows.get(part, ()) if "failed" not in row]
        if of_part and (figure := plot(of_part)) is not None:
            found[name] = png(figure)
    return found


def png(figure: Any) -> bytes:
    """Return a figure as PNG, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    load_pyplot().close(figure)
    return buffer.getvalue()


def draw_ratios(rows: Sequence[Row], title: str) -> bytes:
    """Return the PNG of a comparison's ratios, without those of errors."""
    shown = [row for row in rows if row["ratio"] and row["part"] != "accuracy"][::-1]
    figure, axes = load_pyplot().subplots(
        figsize=(9, 1.2 + 0.24 * len(shown)), layout="constrained"
    )
    labels = [f"{row['part']}: {row['name']}" for row in shown]
    values = [row["ratio"] for row in shown]
    colours = [_FLOWHN if value >= 1 else _SECOND for value in values]
    _bars(axes, labels, values, colours, form="{:.2f}")
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_xscale("log")
    axes.set_title(title, loc="left", parse_math=False)  # a folder's name may have a $
    axes.set_xlabel("ratio, above 1 where the second result is better")
    return png(figure)


def _training(rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if "tokens_per_second" in row]
    if not rows:
        return None
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    heights = [sum(row["size"] == size for row in rows) for size in sizes]
    figure, stack = _stacked(heights, width=7, margin=1)
    for size, axes in zip(sizes, stack, strict=True):
        of_size = [row for row in rows if row["size"] == size][::-1]
        _bars(
            axes,
            [row["model"] for row in of_size],
            [row["tokens_per_second"] for row in of_size],
            [_OTHER if row["model"] in BASELINES else _FLOWHN for row in of_size],
        )
        axes.set_title(f"Training at {size}: FlowHN (blue) and baselines (grey)", loc="left")
        axes.set_xlabel("tokens per second")
    return figure


def _kernels(rows: Sequence[Row]) -> Any:
    measured = [
        each
        for row in rows
        for each in row.get("measurements", ())
        if each.get("both_ratio") is not None
    ][::-1]
    if not measured:
        return None
    figure, axes = load_pyplot().subplots(
        figsize=(9, 1.2 + 0.26 * len(measured)), layout="constrained"
    )
    labels = [f"{each['operation']} {each['shape']}: {each['backend']}" for each in measured]
    colours = [_OTHER if _is_peer(each) else _FLOWHN for each in measured]
    _bars(axes, labels, [each["both_ratio"] for each in measured], colours, form="{:,.1f}")
    axes.axvline(1, color="#555555", linewidth=1)
    axes.set_xscale("log")
    axes.set_title("Forward and backward: ours (blue) and peers (grey)", loc="left")
    axes.set_xlabel("time over the device's floor for the operation")
    return figure


def _is_peer(measurement: Row) -> bool:
    """Return whether a measurement is of another project's code, by the name of its backend."""
    return " " in measurement["backend"] or "." in measurement["backend"]


def _costs(rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if row.get("costs")]
    if not rows:
        return None
    heights = [len(row["costs"]) for row in rows]
    figure, stack = _stacked(heights, width=9, margin=0.8)
    for row, axes in zip(rows, stack, strict=True):
        costs = row["costs"][::-1]
        labels = [f"{cost['operation']}  {cost['source']}" for cost in costs]
        shares = [100 * cost["share"] for cost in costs]
        _bars(axes, labels, shares, [_FLOWHN] * len(costs), form="{:.1f}")
        axes.set_title(f"The largest costs of a train step of {row['key']}", loc="left")
        axes.set_xlabel("% of the device's time")
    return figure


def _learning(rows: Sequence[Row]) -> Any:
    rows = [row for row in rows if "losses" in row]
    if not rows:
        return None
    figure, axes = load_pyplot().subplots(figsize=(6, 4), layout="constrained")
    for row, colour in zip(rows, (_FLOWHN, _SECOND), strict=False):
        losses = np.array(row["losses"], float)  # None, which stands for NaN, becomes NaN again
        axes.plot(np.arange(1, len(losses) + 1), losses, color=colour, alpha=0.25, linewidth=1)
        smooth = smoothed(losses)
        axes.plot(
            np.arange(len(losses) - len(smooth), len(losses)) + 1,
            smooth,
            color=colour,
            label=row["key"],
        )
    axes.set_title("Loss in training: mean of 20 steps (line) and single steps (pale)", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _stacked(bars: Sequence[int], width: float, margin: float) -> tuple[Any, Any]:
    """Return a figure and its axes, one below another, each high enough for its bars."""
    figure, grid = load_pyplot().subplots(
        len(bars),
        figsize=(width, margin + 0.28 * sum(bars) + 0.6 * len(bars)),
        height_ratios=bars,
        layout="constrained",
        squeeze=False,
    )
    return figure, grid[:, 0]


def _bars(
    axes: Any,
    labels: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    form: str = "{:,.0f}",
) -> None:
    """Draw horizontal bars, each with its value."""
    places = range(len(labels))
    drawn = axes.barh(places, values, color=colours)
    axes.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15, y=0.01)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.title.set_fontsize(10)


_FIGURES: dict[str, tuple[str, Callable[[Sequence[Row]], Any]]] = {
    "training": ("training.png", _training),
    "kernel_speed": ("kernels.png", _kernels),
    "step_costs": ("costs.png", _costs),
    "learning": ("learning.png", _learning),
}
