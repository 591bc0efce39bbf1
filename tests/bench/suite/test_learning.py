"""Part `learning`, with a model that learns within seconds."""

import dataclasses

import numpy as np
import pytest

from flowhn_jax.bench.suite import learning
from flowhn_jax.bench.suite.learning import largest_difference, smoothed
from tests.small import small_baseline, small_config


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def small_model(monkeypatch, data_folder):
    monkeypatch.setattr(learning, "STEPS", 40)
    monkeypatch.setattr(learning, "data_folder", lambda: data_folder)
    train = {"batch_size": 4, "learning_rate": 1e-2}
    config = small_config("no_split", train=train, mesh={"data": 1})
    model = small_baseline("llama", vocab_size=384, context=256, blocks=1)
    config = dataclasses.replace(config, model=model)
    monkeypatch.setattr(learning, "recipe", lambda size, model: config)
    return monkeypatch


def test_losses_in_both_dtypes(small_model):
    rows = list(learning.measure(learning.plan(), {}))
    assert [row["key"] for row in rows] == ["bfloat16", "bfloat16", "float32", "float32"]
    assert [len(row["losses"]) for row in rows] == [20, 40, 20, 40]
    assert [bool(row.get("partial")) for row in rows] == [True, False, True, False]
    assert rows[3]["losses"][:20] == rows[2]["losses"]
    for row in rows:
        assert row["steps"] == 40
        assert row["losses"][0] == pytest.approx(np.log(384), abs=1)
    for row in (rows[1], rows[3]):
        assert row["losses"][-1] < row["losses"][0] - 0.3
    # Equal parameters and data: the first losses differ by rounding alone.
    first = abs(rows[1]["losses"][0] - rows[3]["losses"][0])
    assert 0 < first < 0.05
    assert 0 < largest_difference([rows[1], rows[3]]) < 0.2


def test_a_dtype_that_fails_costs_one_row(small_model):
    compile_programs = learning.compile_programs

    def refuse(config, mesh):
        if config.model.dtype == "bfloat16":
            raise RuntimeError("no bfloat16\nhere")
        return compile_programs(config, mesh)

    small_model.setattr(learning, "STEPS", 20)
    small_model.setattr(learning, "compile_programs", refuse)
    failed, learned = learning.measure(learning.plan(), {})
    assert failed == {"key": "bfloat16", "failed": "RuntimeError: no bfloat16"}
    assert len(learned["losses"]) == 20


def test_smoothed_is_the_mean_of_twenty(rng):
    losses = rng.standard_normal(50)
    found = smoothed(losses)
    assert found.shape == (31,)
    for i, value in enumerate(found):
        assert value == pytest.approx(losses[i : i + 20].mean())


@pytest.mark.parametrize("steps", [0, 1, 19])
def test_fewer_than_twenty_losses_have_no_mean(steps):
    assert smoothed(np.ones(steps)).shape == (0,)


def test_the_largest_difference_of_two_curves(rng):
    losses = list(rng.standard_normal(60))
    other = [loss + 0.5 * (i >= 40) for i, loss in enumerate(losses)]
    rows = [{"losses": losses}, {"losses": other}]
    assert largest_difference(rows) == pytest.approx(0.5)
    assert largest_difference([{"losses": losses}, {"losses": other[:40]}]) == pytest.approx(0)
    halves = [{"losses": losses}, {"losses": other[:50]}]
    assert largest_difference(halves) == pytest.approx(0.25)  # 10 of the last 20


@pytest.mark.parametrize(
    "rows", [[], [{"losses": [1.0] * 40}], [{"losses": [1.0] * 40}, {"failed": "x"}]]
)
def test_no_difference_without_two_curves(rows):
    assert largest_difference(rows) is None
