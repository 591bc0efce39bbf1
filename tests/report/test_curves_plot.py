import numpy as np
import pytest

from flowhn_jax.report import curves_plot


def test_each_model_is_a_line_over_seconds_and_over_flops(figures):
    losses = np.linspace(4.0, 2.0, 5)
    curves = {
        name: curves_plot.LearningCurve(
            kind, np.arange(5.0) * pace, np.arange(5.0) * 1e9, losses + pace
        )
        for pace, (name, kind) in enumerate((("best", "flowhn"), ("llama", "llama")), 1)
    }
    curves_plot.plot_curves(curves, "tiny", "x.png")
    seconds, flops = figures[0].axes
    for axes, places in ((seconds, [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]]), (flops, None)):
        for pace, line in enumerate(axes.lines, 1):
            expected = places[pace - 1] if places else (np.arange(5) * 1e9).tolist()
            assert line.get_xdata().tolist() == expected
            assert line.get_ydata() == pytest.approx(losses + pace)  # too few to smooth
    assert [line.get_linestyle() for line in seconds.lines] == ["-", "--"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["best", "llama"]
    low, high = seconds.get_ylim()
    assert low < 3.0 < 6.0 < high


def test_smoothing_is_the_mean_of_a_tenth(rng):
    values = rng.normal(size=40)
    found = curves_plot.smooth(values)
    assert len(found) == 40
    assert found[0] == pytest.approx(values[:3].mean())
    assert found[20] == pytest.approx(values[18:23].mean())
    assert found[-1] == pytest.approx(values[-3:].mean())
    assert curves_plot.smooth(values[:9]) == pytest.approx(values[:9])
