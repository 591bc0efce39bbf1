"""The learning curves of a comparison: the training loss over seconds and over FLOPs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flowhn_jax.report.plots import load_pyplot, save_figure

_GRID = "#e6e8eb"
_SMOOTHING = 10  # a point is the mean over one part in this many of a curve
_IGNORED_START = 0.05  # share of a curve's beginning that does not set the vertical range


class LearningCurve(NamedTuple):
    """The training of a model, mean over its seeds.

    Attributes:
      kind: 'flowhn', or the baseline's.
      seconds: [N] of train steps up to each row.
      flops: [N] of training up to each row.
      loss: [N] nats per token in the batch of each row.
    """

    kind: str
    seconds: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


def plot_curves(curves: Mapping[str, LearningCurve], title: str, path: str) -> None:
    """Draw the training losses of models over seconds, and over FLOPs next to it.

    A point is the mean of the rows around it, a tenth of all. FlowHN's are solid lines, the
    baselines' dashed ones.

    Args:
      curves: by the name of the model.
      title: above the picture.
      path: file to write; its ending is the format.
    """
    pyplot = load_pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    colours = itertools.cycle(pyplot.get_cmap("tab10").colors)
    tops, bottoms = [], []
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        loss = smooth(curve.loss)
        style = "-" if curve.kind == "flowhn" else "--"
        for axes, places in zip(panels, (curve.seconds, curve.flops), strict=True):
            axes.plot(places, loss, style, color=colour, label=name, linewidth=1.4)
        tops.append(loss[int(len(loss) * _IGNORED_START)])
        bottoms.append(loss.min())
    margin = 0.05 * (max(tops) - min(bottoms)) or 0.1
    for axes, label in zip(panels, ("seconds of train steps", "training FLOPs"), strict=True):
        axes.set_xlabel(label)
        axes.set_ylim(min(bottoms) - margin, max(tops) + margin)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss, nats per token")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the moving average [N] over a tenth of the values, over fewer at both ends."""
    count = len(values)
    half = count // (2 * _SMOOTHING)
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(values, np.float64))))
    at = np.arange(count)
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, count)
    return (sums[end] - sums[first]) / (end - first)
