import numpy as np
import pytest

from flowhn_jax.compare import scores
from flowhn_jax.evaluation.by_position import Curve


def curve(nll, targets):
    return Curve(np.array(nll, float), np.square(nll), np.array(targets))


def test_the_end_of_the_context_is_its_last_eighth():
    nll, targets = np.arange(24.0), [2] * 22 + [1, 3]
    assert scores.end_of_context(curve(nll, targets)) == (21 + 22 + 23) / (2 + 1 + 3)
    assert scores.end_of_context(curve(nll[:7], targets[:7])) == 6 / 2  # at least one position


def test_documents_that_are_all_short_have_no_end_of_context():
    assert scores.end_of_context(curve([1.0] * 20 + [0.0] * 4, [1] * 21 + [0] * 3)) is None


def test_a_run_without_scores(tmp_path):
    assert scores.read(str(tmp_path)) == dict.fromkeys(scores.KEYS)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"end_of_context_loss": "1", "recall_accuracy": null}',
        '{"end_of_context_loss": NaN, "recall_accuracy": null}',
    ],
)
def test_damaged_scores_are_refused(tmp_path, text):
    (tmp_path / scores.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"scores.json' is damaged; remove it, and compare again"):
        scores.read(str(tmp_path))
