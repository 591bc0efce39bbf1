"""The picture of a sweep: quality over the values of its first key."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flowhn_jax.report.plots import load_pyplot, save_figure

_SEED = "train.seed"
_VALUE = "validation_bits_per_byte"
_MARKERS = "osD^vP"


def plot_sweep(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: str) -> None:
    """Draw the final bits per byte over the first key, a line for each value of the others.

    Seeds are points, which the line joins at their means. Runs without a result are left out.

    Args:
      rows: the rows of the points: the value of each key, and validation_bits_per_byte.
      keys: the keys of the grid; the first one besides the seed is the horizontal axis.
      path: file to write; its ending is the format.
    """
    pyplot = load_pyplot()
    from matplotlib.ticker import NullLocator

    axis, *others = sorted(keys, key=lambda key: key == _SEED)
    others = [key for key in others if key != _SEED]
    values = list(dict.fromkeys(row[axis] for row in rows))
    is_numeric = all(isinstance(value, int | float) for value in values)
    places = {value: value if is_numeric else i for i, value in enumerate(values)}
    groups: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row[_VALUE] is not None:
            label = ", ".join(f"{key.rpartition('.')[2]} {row[key]}" for key in others)
            of_group = groups.setdefault(label, {})
            of_group.setdefault(places[row[axis]], []).append(row[_VALUE])
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for number, (label, found) in enumerate(groups.items()):
        at = sorted(found)
        means = [statistics.fmean(found[each]) for each in at]
        (line,) = axes.plot(at, means, marker=_MARKERS[number % len(_MARKERS)], label=label)
        scattered = [(each, value) for each in at if len(found[each]) > 1 for value in found[each]]
        if scattered:
            axes.scatter(*zip(*scattered, strict=True), s=14, alpha=0.5, color=line.get_color())
    if is_numeric and axis != _SEED and min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([places[value] for value in values], [str(value) for value in values])
    axes.set_xlabel(axis)
    axes.set_ylabel("validation, bits per byte (lower is better)")
    axes.set_title("Final validation; a line joins the means over the seeds" if _SEED in keys
                   and axis != _SEED else "Final validation", loc="left", fontsize=10)  # fmt: skip
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if any(groups):
        axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)
