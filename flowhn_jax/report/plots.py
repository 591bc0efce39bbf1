"""Pictures, drawn with matplotlib (imported only here, and only when asked for)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowhn_jax.split import STRATEGIES, Plan

_COLOURS = ("#2a78d6", "#eb6834", "#8a63b8")  # SSM, attention, both
_LABELS = ("SSM", "attention", "both")


_FLOWHN, _BASELINE, _LINE = "#2a78d6", "#b5bcc6", "#eb6834"


def load_pyplot() -> Any:
    """Return matplotlib.pyplot without a screen.

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


def _save(figure: Any, path: str) -> None:
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ValueError(f"Cannot draw to {os.path.basename(path)!r}: {error}") from error
    finally:
        load_pyplot().close(figure)


def plot_speeds(rows: Sequence[Mapping[str, Any]], title: str, path: str) -> None:
    """Draws training's tokens/s as bars and MFU as a line (the paper's figure 1) to `path`.

    Where the device's peak is not known the line is TFLOP/s a device.

    Args:
      rows: of each model: model, train_tokens_per_second with _min and _max, train_mfu and
        train_tflops_per_second_per_device.
      title: above the picture.
      path: its ending says the kind of file.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
      ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    from matplotlib.patches import Patch

    names = [row["model"] for row in rows]
    key = "train_tokens_per_second"
    speeds, least, most = (
        np.array([row[key + end] for row in rows]) for end in ("", "_min", "_max")
    )
    label, key, factor = "MFU %", "train_mfu", 100
    if any(row[key] is None for row in rows):
        label, key, factor = "TFLOP/s a device", "train_tflops_per_second_per_device", 1
    line = [factor * row[key] for row in rows]

    size = max(4.5, 1 + 0.75 * len(rows)), 4
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    colours = [_FLOWHN if name in STRATEGIES else _BASELINE for name in names]
    axes.bar(
        names,
        speeds,
        color=colours,
        yerr=(speeds - least, most - speeds),
        ecolor="#555555",
        capsize=2,
    )
    axes.set_ylabel("training, tokens/s")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", length=0, rotation=30)
    axes.set_title(title, loc="left", fontsize=10)
    right = axes.twinx()
    (drawn,) = right.plot(names, line, color=_LINE, marker="o", markersize=4)
    right.set_ylabel(label)
    right.set_ylim(bottom=0)
    for each in (axes, right):
        each.spines[["top", "left", "right"]].set_visible(False)
    handles = [Patch(color=_FLOWHN), Patch(color=_BASELINE), drawn]
    labels = ["FlowHN", "baselines", label]
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def plot_losses(rows: Sequence[Mapping[str, Any]], title: str, path: str) -> None:
    """Draw the training and validation loss of a run over its steps to `path`.

    Args:
      rows: metrics of the run: step, loss (None in a skipped step) and, in some, validation_loss.
      title: above the picture.
      path: its suffix names the file format.

    Raises:
      ValueError: matplotlib cannot write this file format.
      ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for key, label, style in (
        ("loss", "training", dict(color=_FLOWHN, linewidth=1.2)),
        ("validation_loss", "validation", dict(color=_LINE, linestyle="none", marker="o")),
    ):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, markersize=4, **style)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_by_position(curves: Mapping[str, Any], path: str) -> None:
    """Draws the mean loss over the number of tokens before, in bins that grow, to `path`.

    Args:
      curves: by name, each with nll and targets [N], sums over targets with 1, 2, ... before them.
      path: its ending says the kind of file.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
      ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, curve in curves.items():
        count = len(curve.nll)
        edges = np.unique(np.geomspace(1, count + 1, 4 * count.bit_length()).astype(int))
        nll, targets = (
            np.add.reduceat(each, edges[:-1] - 1) for each in (curve.nll, curve.targets)
        )
        middle = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
        there = targets > 0
        axes.plot(middle[there], nll[there] / targets[there], label=name, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel("tokens before")
    axes.set_ylabel("nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_split(plan: Plan, title: str, path: str) -> None:
    """Draws which branch each position goes to in each block (the paper's figure 2) to `path`.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
      ImportError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = np.zeros((len(plan.blocks), plan.length), np.int8)
    for row, block in zip(rows, plan.blocks, strict=True):
        attends = [block.attention.contains(position) for position in range(plan.length)]
        row[:] = attends if block.is_split else 2

    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes.imshow(rows, aspect="auto", interpolation="nearest", cmap=ListedColormap(_COLOURS),
                vmin=0, vmax=2, extent=(0, plan.length, len(rows) - 0.5, -0.5))  # fmt: skip
    axes.hlines(np.arange(len(rows) - 1) + 0.5, 0, plan.length, color="white", linewidth=3)
    axes.set_yticks(range(len(rows)), [f"block {index}" for index in range(len(rows))])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_xlabel("token position")
    axes.set_title(title, loc="left", fontsize=10)
    handles = [Patch(color=_COLOURS[i], label=_LABELS[i]) for i in np.unique(rows)]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)
