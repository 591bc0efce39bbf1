"""The picture of a sweep, read back from matplotlib's figure."""

import pytest

from flowhn_jax.report import plots, sweep_plot

RATE, SEED = "train.learning_rate", "train.seed"


@pytest.fixture
def axes_of(monkeypatch):
    """Return a function that draws rows and returns the axes."""
    kept = []
    monkeypatch.setattr(sweep_plot, "save_figure", lambda figure, path: kept.append(figure))

    def draw(rows, keys):
        sweep_plot.plot_sweep(rows, keys, "x.png")
        (axes,) = kept[-1].axes
        return axes

    yield draw
    plots.load_pyplot().close("all")


def rows_of(keys, *values):
    names = (*keys, "validation_bits_per_byte")
    return [dict(zip(names, each, strict=True)) for each in values]


def labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_a_line_joins_the_means_over_the_seeds(axes_of):
    keys = [SEED, RATE]
    values = [(0, 1e-3, 2.0), (1, 1e-3, 3.0), (0, 1e-2, 1.0), (1, 1e-2, None)]
    axes = axes_of(rows_of(keys, *values), keys)
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1e-3, 2.5], [1e-2, 1.0]]
    (seeds,) = axes.collections
    assert seeds.get_offsets().tolist() == [[1e-3, 2.0], [1e-3, 3.0]]
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", RATE)
    assert labels(axes) == ["0.001", "0.01"]
    assert axes.get_legend() is None


def test_names_are_places_and_other_keys_are_lines(axes_of):
    keys = ["model.split.strategy", RATE]
    values = [("fac_split", 1e-3, 2.0), ("fac_split", 2e-3, 2.5), ("fai_split", 1e-3, 3.0)]
    axes = axes_of(rows_of(keys, *values), keys)
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 2], [1, 3]], [[0, 2.5]]]
    assert labels(axes) == ["fac_split", "fai_split"]
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["learning_rate 0.001", "learning_rate 0.002"]


def test_seeds_alone_are_a_linear_axis(axes_of):
    axes = axes_of(rows_of([SEED], (1, 2.0), (9, 2.5)), [SEED])
    assert axes.get_xscale() == "linear"
    assert axes.lines[0].get_xydata().tolist() == [[1, 2.0], [9, 2.5]]


def test_runs_without_results_leave_an_empty_picture(axes_of):
    axes = axes_of(rows_of([SEED], (0, None), (1, None)), [SEED])
    assert not axes.lines
