import pytest

from flowhn_jax.report import curves_plot, plots


@pytest.fixture
def figures(monkeypatch):
    """Keep the figures that are drawn rather than write them."""
    kept = []
    for module in (plots, curves_plot):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: kept.append(figure))
    yield kept
    plots.load_pyplot().close("all")
