"""Which of several checkpoints is the best, by what they hold and by the rows."""

import json
import math

import pytest

from flowhn_jax.checkpoints.losses import best_step, loss_key, validations


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ({2: 3.0, 4: 2.0, 6: 2.5}, 4),
        ({2: 2.0, 4: 2.0, 6: 2.5}, 4),  # the newest of equal ones
        ({2: 3, 4: None, 6: math.nan}, 2),
        ({2: math.inf, 4: "low", 6: None}, None),
        ({}, None),
    ],
)
def test_the_lowest_loss_that_is_a_number(found, best):
    known = {step: {"validation_loss/code": loss, "loss": 0.0} for step, loss in found.items()}
    assert best_step(known, loss_key("code")) == best
    assert best_step(known, loss_key("code", ema=True)) is None


def test_rows_stand_in_for_missing_metrics(tmp_path):
    rows = [{"step": step, "validation_loss": float(step)} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = {"validation_loss": 9.0}
    found = validations(str(tmp_path), {2: held, 4: None, 6: None})
    assert found == {2: held, 4: rows[1], 6: {}}
