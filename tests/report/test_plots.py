"""The pictures: what is drawn, read back from matplotlib's figures."""

import types

import numpy as np
import pytest

from flowhn_jax.report import plots
from flowhn_jax.split import SplitConfig, make_plan
from tests.split.strategies import DIMS


def row(model, speed, bits=None, mfu=None):
    return {
        "model": model,
        "kind": "flowhn" if model in ("fac_split", "best") else model,
        "train_tokens_per_second": speed,
        "train_tokens_per_second_min": 0.9 * speed,
        "train_tokens_per_second_max": 1.2 * speed,
        "train_mfu": mfu,
        "train_tflops_per_second_per_device": speed / 1e5,
        "validation_bits_per_byte": bits,
    }


def curve_of(losses):
    """Return the curve of the losses of each position's targets."""
    return types.SimpleNamespace(
        nll=np.array([np.sum(each) for each in losses]),
        squares=np.array([np.sum(np.square(each)) for each in losses]),
        targets=np.array([len(each) for each in losses]),
    )


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_comparison_has_a_bar_and_a_point_per_model_and_the_front_alone_as_a_line(figures):
    rows = [row("fac_split", 3000.0, 2.5), row("llama", 2000.0, 2.6), row("jamba", 1000.0, 2.2)]
    plots.plot_comparison(rows, "tiny", "x.png", "300 seconds")
    bars, points = figures[0].axes
    assert [bar.get_width() for bar in bars.patches] == [1000, 2000, 3000]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["jamba", "llama", "fac_split"]
    assert texts(bars) == ["10", "20", "30"]
    assert "GFLOP/s" in bars.get_title(loc="left")
    assert "after 300 seconds" in points.get_title(loc="left")
    (front,) = points.lines
    assert front.get_xydata().tolist() == [[1000, 2.2], [3000, 2.5]]
    assert front.get_marker() == "o"
    assert front.get_drawstyle() == "steps-pre"  # from a point up, then to the faster one
    (marks,) = points.collections
    assert marks.get_offsets().tolist() == [[3000, 2.5], [2000, 2.6], [1000, 2.2]]
    assert texts(points) == ["fac_split", "llama", "jamba"]


def test_deviations_over_seeds_are_bars(figures):
    rows = [row("fac_split", 3000.0, 2.5), row("llama", 2000.0, 2.3)]
    rows[1]["validation_bits_per_byte_deviation"] = 0.1
    plots.plot_comparison(rows, "tiny", "x.png")
    _, bars = figures[0].axes[1].collections
    (first, second) = (segment.tolist() for segment in bars.get_segments())
    assert first == [[3000, 2.5], [3000, 2.5]]
    assert second == [[2000, pytest.approx(2.2)], [2000, pytest.approx(2.4)]]


def test_the_front_is_what_no_point_equals_or_beats(rng):
    """Compared with the definition, on points with ties."""
    for _ in range(20):
        points = [tuple(map(float, point)) for point in rng.integers(0, 6, (9, 2))]
        front = plots.pareto_front(points)
        beaten = {
            index
            for index, (speed, loss) in enumerate(points)
            if any(s >= speed and b <= loss and (s, b) != (speed, loss) for s, b in points)
        }
        assert {points[index] for index in front} == {
            point for index, point in enumerate(points) if index not in beaten
        }
        assert len({points[index] for index in front}) == len(front)
        assert [points[index][0] for index in front] == sorted(
            (points[index][0] for index in front), reverse=True
        )


def test_names_of_points_that_are_close_do_not_overlap(figures):
    rows = [row("fac_split", 1000.0, 2.5), row("llama", 1010.0, 2.5), row("jamba", 5000.0, 2.2)]
    plots.plot_comparison(rows, "tiny", "x.png")
    extents = [text.get_window_extent() for text in figures[0].axes[1].texts]
    assert not extents[0].overlaps(extents[1])


def test_comparison_of_models_that_were_not_trained_has_bars_alone(figures):
    plots.plot_comparison([row("fac_split", 3.0, mfu=0.41)], "135m", "x.png")
    (bars,) = figures[0].axes
    assert texts(bars) == ["41 %"]
    assert "MFU" in bars.get_title(loc="left")


def test_bounds_are_stacked_bars(figures):
    parts = {"a": {"head": 2.0, "scan": 1.0}, "b": {"head": 4.0, "scan": 0.5}}
    plots.plot_bounds(parts, {"a": 1.5, "b": 2.5}, "x.png")
    (axes,) = figures[0].axes
    head, scan = axes.containers
    assert [bar.get_width() for bar in head] == [2, 4]
    assert [bar.get_x() for bar in scan] == [2, 4]
    assert texts(axes) == ["a", "3.0", "b", "4.5"]
    ideal = [line.get_segments()[0][0][0] for line in axes.collections]
    assert ideal == [1.5, 2.5]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["head", "scan"]


def test_losses_of_a_run(figures):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": None}]
    rows.append({"step": 3, "loss": 2.0, "validation_loss": 2.5})
    plots.plot_losses(rows, "fac_split", "x.png")
    (axes,) = figures[0].axes
    training, validation = (line.get_xydata().tolist() for line in axes.lines)
    assert training == [[1, 3.0], [3, 2.0]]
    assert validation == [[3, 2.5]]


def test_losses_of_a_run_on_several_sets(figures):
    rows = [{"step": 2, "loss": 3.0, "validation_loss": 2.5}]
    rows[0] |= {"validation_loss/wiki": 2.0, "validation_loss/code": 3.0}
    plots.plot_losses(rows, "fac_split", "x.png")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {
        "training": [[2, 3.0]],
        "validation": [[2, 2.5]],
        "validation, code": [[2, 3.0]],
        "validation, wiki": [[2, 2.0]],
    }
    assert len({line.get_color() for line in axes.lines}) == 4


def test_bins_hold_all_targets_once_and_errors_shrink_with_them(rng):
    losses = [rng.normal(2.0, 1.0, count) for count in [400] * 64 + [100] * 64 + [0] * 8]
    middle, mean, error = plots.bin_positions(curve_of(losses))
    assert middle[0] == 1
    assert np.all(np.diff(middle) > 0)
    assert middle[-1] < 129
    # The first position alone: a standard deviation of 1 over 400 targets.
    assert error[0] == pytest.approx(np.std(losses[0], ddof=1) / 20)
    assert error[-1] < error[0]
    assert np.all(np.abs(mean - 2) < 6 * error)


def test_loss_by_position_has_a_title_plain_ticks_and_a_band(figures):
    plots.plot_by_position({"fac_split": curve_of([[1.0, 2.0, 3.0]] * 200)}, "x.png")
    (axes,) = figures[0].axes
    assert "Loss by position" in axes.get_title(loc="left")
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["1", "2", "4", "8", "16", "32", "64", "128"]
    assert len(axes.collections) == 1


def test_an_unknown_ending_is_refused(tmp_path):
    curve = curve_of([[1.0]] * 4)
    with pytest.raises(ValueError, match=r"Cannot draw to 'plot\.xyz'"):
        plots.plot_by_position({"a": curve}, str(tmp_path / "plot.xyz"))


def test_split_has_a_colour_for_each_branch_and_one_for_learned_positions(figures):
    drawn = {
        "fai_split": ([[2, 2, 2, 2], [0, 0, 0, 1]], ["SSM", "attention", "both"]),
        "learned_split": ([[2, 2, 2, 2], [3, 3, 3, 3]], ["both", "either, by score"]),
    }
    for strategy, (rows, labels) in drawn.items():
        split = SplitConfig(strategy, balance=0.25, period=4, stem=1)
        plots.plot_split(make_plan(split, DIMS, blocks=2, context=4), strategy, "x.png")
        (axes,) = figures[-1].axes
        assert axes.images[0].get_array().tolist() == rows
        (legend,) = figures[-1].legends
        assert [text.get_text() for text in legend.get_texts()] == labels
        colours = [patch.get_facecolor() for patch in legend.get_patches()]
        for value, colour in zip(np.unique(rows), colours, strict=True):
            assert axes.images[0].to_rgba(np.array([[value]]))[0, 0].tolist() == list(colour)
