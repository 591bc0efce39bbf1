"""Pictures, drawn with matplotlib (imported only here, and only when asked for)."""

import os

import numpy as np

from flowhn_jax.split import Plan

_COLOURS = ("#2a78d6", "#eb6834", "#8a63b8")  # SSM, attention, both
_LABELS = ("SSM", "attention", "both")


def plot_split(plan: Plan, title: str, path: str) -> None:
    """Draws which branch each position goes to in each block (the paper's figure 2) to `path`.

    Raises:
      ValueError: matplotlib cannot write this kind of file.
      ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: pip install matplotlib."
        ) from error

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
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ValueError(f"Cannot draw to {os.path.basename(path)!r}: {error}") from error
    finally:
        pyplot.close(figure)
