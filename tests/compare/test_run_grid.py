import dataclasses

import pytest

from flowhn_jax.compare.run_grid import parse_rates, run_config, run_grid
from flowhn_jax.compare.training_results import best_runs, model_result
from tests.small import small_config

CONFIG = small_config(train={"learning_rate": 1e-3})
OTHER = small_config("fai_split", train={"learning_rate": 3e-3})


def test_rates():
    assert parse_rates([]) == ()
    assert parse_rates(["1e-3", " 0.003"]) == (1e-3, 3e-3)
    for wrong in (["fast"], ["0"], ["-1"], ["nan"], ["inf"], [""], ["1e-3", "0.001"]):
        with pytest.raises(ValueError, match=r"--rates must be different numbers above 0, .*; got"):
            parse_rates(wrong)


def test_a_run_is_named_by_what_differs_from_the_recipe():
    """So the runs of a comparison without these flags are used by one with them."""
    assert [run.name for run in run_grid({"a": CONFIG, "b": OTHER}, (), 1)] == ["a", "b"]
    found = run_grid({"a": CONFIG, "b": OTHER}, (1e-3, 3e-3), 2)
    assert [run.name for run in found] == [
        "a", "a_learning_rate=0.003", "b_learning_rate=0.001", "b",
        "a_seed=1", "a_learning_rate=0.003_seed=1", "b_learning_rate=0.001_seed=1", "b_seed=1",
    ]  # fmt: skip


def test_the_config_of_a_run():
    _, run = run_grid({"a": CONFIG}, (5e-3,), 2)
    config = run_config(CONFIG, run, 1234, "data/mine")
    train = config.train
    assert (train.steps, train.learning_rate, train.seed, config.data.seed) == (1234, 5e-3, 1, 1)
    assert (train.log_every, train.eval_every, train.checkpoint_every) == (12, 1234, 123)
    assert config.model == CONFIG.model
    assert config.data.path == "data/mine"
    unchanged = dict(steps=1, log_every=1, eval_every=1, checkpoint_every=1, seed=0)
    unchanged |= dict(learning_rate=1e-3)
    before, after = (dataclasses.replace(each, **unchanged) for each in (CONFIG.train, train))
    assert before == after
    assert run_config(CONFIG, run, 3, "").train.log_every == 1


def result(name, model, rate, bits, **values):
    known = {"trained_steps": 9, "trained_tokens": 90, "validation_loss": 2.0}
    known |= {"trained_seconds": None, "name": name, "model": model, "learning_rate": rate}
    known |= {"end_of_context_loss": None, "recall_accuracy": None}
    return known | {"validation_bits_per_byte": bits} | values


def test_a_model_counts_at_its_best_rate():
    """By the mean over the seeds: the single best run is at another rate."""
    results = [
        result("0", "a", 1e-3, 2.0),
        result("1", "a", 1e-3, 3.0),
        result("2", "a", 3e-3, 2.1, trained_seconds=5.0),
        result("3", "a", 3e-3, 2.3, trained_seconds=6.0),
        result("4", "a", 3e-3, None),  # did not end
        result("5", "a", 5e-3, None),
    ]
    found = model_result(results)
    assert (found["learning_rate"], found["seeds"]) == (3e-3, 2)
    assert found["validation_bits_per_byte"] == pytest.approx(2.2)
    assert found["validation_bits_per_byte_deviation"] == pytest.approx(0.02**0.5)
    assert found["trained_steps"] == 9
    assert found["trained_seconds"] == 5.5
    assert best_runs([{"model": "a"} | found], results) == {"a": ["2", "3"]}


def test_a_model_without_results():
    found = model_result([result("0", "a", 1e-3, None), result("1", "a", 3e-3, None)])
    assert (found["learning_rate"], found["seeds"]) == (1e-3, 0)
    assert found["validation_bits_per_byte"] is None
    assert found["trained_tokens"] is None
