import numpy as np
import pytest

from flowhn_jax.evaluation import by_position
from flowhn_jax.evaluation.by_position import Curve
from tests.small import small_config


def curve_of(losses):
    """Return the curve of lists of losses, a list per position."""
    arrays = [np.array(each, np.float64) for each in losses]
    return Curve(
        np.array([each.sum() for each in arrays]),
        np.array([np.square(each).sum() for each in arrays]),
        np.array([len(each) for each in arrays]),
    )


def test_standard_errors_are_those_of_the_mean():
    losses = [1.0, 2.0, 4.5], [3.0, 3.0], [2.0], []
    errors = curve_of(losses).standard_error()
    assert errors[0] == pytest.approx(np.std(losses[0], ddof=1) / np.sqrt(3))
    assert errors[1] == 0
    assert np.isnan(errors[2:]).all()


def test_the_file_leaves_unknown_errors_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(by_position, "plot_by_position", lambda curves, path: None)
    by_position.write(curve_of([[1.0, 2.0], [3.0], []]), "model", str(tmp_path))
    rows = (tmp_path / "by_position.csv").read_text().splitlines()
    assert rows == ["tokens_before,nll,standard_error,targets", "1,1.5,0.5,2", "2,3.0,,1"]


def test_losses_are_summed_by_the_number_of_preceding_tokens(monkeypatch):
    """A document starts again from one token; padding has no weight."""
    losses = np.array([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 7.0]], np.float32)
    monkeypatch.setattr(by_position, "token_losses", lambda config, params, batch: losses)
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]])
    weights = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.float32)
    batch = {"tokens": segments, "segment_ids": segments, "weights": weights}
    curve = by_position.measure(small_config(), {}, [batch, batch])
    assert curve.nll.tolist() == [2 * 8, 2 * 7, 2 * 6, 2 * 7]
    assert curve.squares.tolist() == [2 * 26, 2 * 29, 2 * 36, 2 * 49]
    assert curve.targets.tolist() == [6, 4, 2, 2]
    quality = curve.quality(10)
    assert (quality.tokens, quality.bytes) == (14, 10)
    assert quality.nll == pytest.approx(4.0)
