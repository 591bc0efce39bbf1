"""Pictures, drawn with matplotlib (imported only here, and only when a picture is drawn).

Each `plot_` function raises ImportError if matplotlib is not installed, and ValueError if it cannot
write the kind of file that the ending of `path` names.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flowhn_jax.split import LearnedBlockPlan, Plan
from flowhn_jax.storage import place

_BLUE, _ORANGE, _PURPLE, _GREY = "#2a78d6", "#eb6834", "#8a63b8", "#8d96a3"
_BRANCH_LABELS = {_BLUE: "SSM", _ORANGE: "attention", _PURPLE: "both", _GREY: "either, by score"}
_FLOWHN, _BASELINE = _BLUE, _GREY
_ERROR, _GRID = "#555555", "#e6e8eb"
# Where a point's name can be: offset in points and alignment, the preferred one first.
_SIDES = (
    ((6, 0), "left", "center"),
    ((-6, 0), "right", "center"),
    ((0, 6), "center", "bottom"),
    ((0, -6), "center", "top"),
    ((6, 8), "left", "bottom"),
    ((6, -8), "left", "top"),
)


class PositionCurve(Protocol):
    """Losses by the number of preceding tokens, from 1 to N."""

    @property
    def nll(self) -> np.ndarray:
        """Return the nats [N], summed over the targets."""
        ...

    @property
    def squares(self) -> np.ndarray:
        """Return the squares [N] of the targets' nats, summed over the targets."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """Return the numbers [N] of targets."""
        ...


def load_pyplot() -> Any:
    """Return matplotlib.pyplot, set up to draw without a screen.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return pyplot


def save_figure(figure: Any, path: str) -> None:
    """Write a figure and free it.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
    """
    target, picture = place(path), io.BytesIO()
    if not target.suffix:
        target = place(f"{path}.png")
    try:
        figure.savefig(picture, dpi=150, format=target.suffix[1:])
    except ValueError as error:
        raise ValueError(f"Cannot draw to {target.name!r}: {error}") from error
    finally:
        load_pyplot().close(figure)
    target.write(picture.getvalue())


def plot_comparison(
    rows: Sequence[Mapping[str, Any]], title: str, path: str, budget: str | None = None
) -> None:
    """Draw the training speed of models as bars and, where known, quality over speed as points.

    Rings and a line show the Pareto front: the models that no other one beats in both speed and
    quality.

    Args:
      rows: per model: model, kind ('flowhn' or a baseline's), train_tokens_per_second with _min
        and _max, train_mfu, train_tflops_per_second_per_device, validation_bits_per_byte (None: not
        trained) and validation_bits_per_byte_deviation.
      title: above the picture.
      path: file to write; its ending is the format.
      budget: what all models were trained for, in words; None: it is not known.
    """
    pyplot = load_pyplot()
    from matplotlib.patches import Patch

    trained = [row for row in rows if row.get("validation_bits_per_byte") is not None]
    height = max(2.6, 1.3 + 0.34 * len(rows))
    if trained:
        figure, (bars, points) = pyplot.subplots(
            1, 2, figsize=(11, max(height, 4)), layout="constrained", width_ratios=(1, 1.1)
        )
        _draw_quality(points, trained, budget)
    else:
        figure, bars = pyplot.subplots(figsize=(7, height), layout="constrained")
    _draw_speed(bars, rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = [Patch(color=_FLOWHN), Patch(color=_BASELINE)]
    figure.legend(
        handles,
        ["FlowHN", "baselines"],
        loc="outside upper right",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    save_figure(figure, path)


def _colour(row: Mapping[str, Any]) -> str:
    return _FLOWHN if row["kind"] == "flowhn" else _BASELINE


def _draw_speed(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one bar per model, the fastest on top, with its MFU (or TFLOP/s) next to it."""
    rows = sorted(rows, key=lambda row: row["train_tokens_per_second"])
    key = "train_tokens_per_second"
    speeds, least, most = (
        np.array([row[key + end] for row in rows]) for end in ("", "_min", "_max")
    )
    axes.barh(
        [row["model"] for row in rows],
        speeds,
        height=0.7,
        color=[_colour(row) for row in rows],
        xerr=(speeds - least, most - speeds),
        ecolor=_ERROR,
        capsize=2,
    )
    if all(row["train_mfu"] is not None for row in rows):
        unit, texts = "MFU", [f"{100 * row['train_mfu']:.0f} %" for row in rows]
    else:
        rates = [row["train_tflops_per_second_per_device"] for row in rows]
        is_small = max(rates) < 1
        unit = f"{'GFLOP' if is_small else 'TFLOP'}/s per device"
        texts = [f"{rate * (1000 if is_small else 1):,.0f}" for rate in rates]
    for index, text in enumerate(texts):
        axes.annotate(
            text, (most[index], index), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, 1.12 * most.max())
    axes.set_xlabel("training, tokens/s")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"Median speed, slowest and fastest round; {unit}", loc="left", fontsize=10)


def _draw_quality(axes: Any, rows: Sequence[Mapping[str, Any]], budget: str | None) -> None:
    """Draw one labelled point per model, bits per byte over training speed, and their front."""
    places = [(row["train_tokens_per_second"], row["validation_bits_per_byte"]) for row in rows]
    axes.scatter(*zip(*places, strict=True), s=36, color=[_colour(row) for row in rows], zorder=3)
    deviations = [row.get("validation_bits_per_byte_deviation") or 0.0 for row in rows]
    if any(deviations):
        axes.errorbar(*zip(*places, strict=True), deviations, fmt="none", ecolor=_ERROR, lw=1)
    front = [places[index] for index in reversed(pareto_front(places))]
    style = dict(color=_ORANGE, linewidth=1.2, marker="o", markersize=10, markerfacecolor="none")
    axes.step(*zip(*front, strict=True), where="pre", label="Pareto front", **style)
    axes.legend(frameon=False, fontsize=8)
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel("training, tokens/s (right is faster)")
    axes.set_ylabel("validation, bits per byte (lower is better)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    after = "" if budget is None else f" after {budget}"
    axes.set_title(f"Quality over speed{after}", loc="left", fontsize=10)
    _label_points(axes, [row["model"] for row in rows], places)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other one equals or beats, the fastest first.

    Args:
      points: speed, where more is better, and quality, where less is better.
    """
    order = sorted(range(len(points)), key=lambda index: (-points[index][0], points[index][1]))
    front: list[int] = []
    best = math.inf
    for index in order:
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front


def _label_points(axes: Any, names: Sequence[str], places: Sequence[tuple[float, float]]) -> None:
    """Write a name next to each point, on the first side where it covers nothing."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # fixes the axes' place, and with it which texts overlap
    taken = []
    for point in places:
        x, y = axes.transData.transform(point)
        taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
    for name, point in zip(names, places, strict=True):
        label = axes.annotate(name, point, _SIDES[0][0], textcoords="offset points", fontsize=8)
        for offset, horizontal, vertical in _SIDES:
            label.set(position=offset, ha=horizontal, va=vertical)
            extent = label.get_window_extent()
            if not any(extent.overlaps(each) for each in taken):
                break
        taken.append(label.get_window_extent())


def plot_losses(rows: Sequence[Mapping[str, Any]], title: str, path: str) -> None:
    """Draw the training and validation loss of a run over its steps.

    Args:
      rows: metrics of the run: step, loss (None in a skipped step) and, in some, validation_loss
        and validation_loss/NAME of its sets.
      title: above the picture.
      path: file to write; its ending is the format.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    series = [
        ("loss", "training", dict(color=_FLOWHN, linewidth=1.2)),
        ("validation_loss", "validation", dict(color=_ORANGE, linestyle="none", marker="o")),
    ]
    prefix = "validation_loss/"
    for key in sorted({key for row in rows for key in row if key.startswith(prefix)}):
        # Without a color, each set takes the next one of the cycle.
        style = dict(linestyle=":", marker=".", linewidth=1.0)
        series.append((key, f"validation, {key.removeprefix(prefix)}", style))
    for key, label, style in series:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_by_position(curves: Mapping[str, PositionCurve], path: str) -> None:
    """Draw the mean loss over the number of preceding tokens, in bins that grow.

    The band is the mean plus and minus two standard errors.

    Args:
      curves: by the name of the model.
      path: file to write; its ending is the format.
    """
    pyplot = load_pyplot()
    from matplotlib.ticker import NullLocator

    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    longest = 1
    for name, curve in curves.items():
        middle, mean, error = bin_positions(curve)
        (line,) = axes.plot(middle, mean, label=name, marker="o", markersize=3)
        axes.fill_between(
            middle, mean - 2 * error, mean + 2 * error, color=line.get_color(), alpha=0.2, lw=0
        )
        longest = max(longest, len(curve.nll))
    axes.set_xscale("log")
    ticks = [2**power for power in range(0, longest.bit_length(), 1 if longest < 1024 else 2)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("preceding tokens in the window")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss by position (band: two standard errors)", loc="left", fontsize=10)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def bin_positions(curve: PositionCurve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the middle, the mean loss and its standard error of bins of positions that grow.

    The bins have equal widths on a logarithmic axis; empty ones are left out. The targets of a bin
    count as independent; the error is NaN in a bin of one target.
    """
    count = len(curve.nll)
    edges = np.unique(np.geomspace(1, count + 1, 4 * count.bit_length()).astype(int))
    nll, squares, targets = (
        np.add.reduceat(np.asarray(each, np.float64), edges[:-1] - 1)
        for each in (curve.nll, curve.squares, curve.targets)
    )
    middles = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
    present = targets > 0
    nll, squares, targets = nll[present], squares[present], targets[present]
    mean = nll / targets
    above_one = np.where(targets > 1, targets - 1, np.nan)
    variance = np.maximum(squares - targets * mean**2, 0) / above_one
    return middles[present], mean, np.sqrt(variance / targets)


def plot_split(plan: Plan, title: str, path: str) -> None:
    """Draw which branch each position goes to in each block (figure 2 of the paper).

    Args:
      plan: the plan of a sequence.
      title: above the picture.
      path: file to write; its ending is the format.
    """
    pyplot = load_pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = np.zeros((len(plan.blocks), plan.length), np.int8)
    for row, block in zip(rows, plan.blocks, strict=True):
        if isinstance(block, LearnedBlockPlan):
            row[:] = 3
        elif block.is_split:
            row[:] = [block.attention.contains(position) for position in range(plan.length)]
        else:
            row[:] = 2

    colours = list(_BRANCH_LABELS)
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=len(colours) - 1,
        extent=(0, plan.length, len(rows) - 0.5, -0.5),
    )
    axes.hlines(np.arange(len(rows) - 1) + 0.5, 0, plan.length, color="white", linewidth=3)
    axes.set_yticks(range(len(rows)), [f"block {index}" for index in range(len(rows))])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_xlabel("token position")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [Patch(color=colours[i], label=_BRANCH_LABELS[colours[i]]) for i in np.unique(rows)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_bounds(
    parts: Mapping[str, Mapping[str, float]], ideal: Mapping[str, float], path: str
) -> None:
    """Draw the bounds of train steps as stacked bars, one bar per step.

    Args:
      parts: milliseconds of each part of a step, by the step's title.
      ideal: milliseconds of each step's model FLOPs at the peak, a line across its bar.
      path: file to write; its ending is the format.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
      ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.9 * len(parts)), layout="constrained")
    colours = pyplot.get_cmap("tab10").colors
    names = list(dict.fromkeys(name for each in parts.values() for name in each))
    ends = np.zeros(len(parts))
    for name, colour in zip(names, colours, strict=False):
        widths = np.array([each.get(name, 0.0) for each in parts.values()])
        axes.barh(range(len(parts)), widths, left=ends, height=0.5, color=colour, label=name)
        ends += widths
    for row, title in enumerate(parts):
        axes.vlines(ideal[title], row - 0.25, row + 0.25, color="black", linewidth=2)
        axes.annotate(title, (0, row - 0.28), va="bottom", fontsize=9)
        axes.annotate(
            f"{ends[row]:.1f}", (ends[row], row), (4, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("ms per step, at least; black: the model's FLOPs at the peak")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)
