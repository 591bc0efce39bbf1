import pytest

from flowhn_jax import flops
from flowhn_jax.compare.budget import Budget, parse_budget, seconds_per_step, steps_for
from flowhn_jax.compare.model_configs import model_config
from tests.small import small_config


@pytest.mark.parametrize(
    ("text", "budget", "written"),
    [
        ("tokens:2000000", Budget("tokens", 2e6), "tokens:2000000"),
        ("flops:1e18", Budget("flops", 1e18), "flops:1e+18"),
        ("seconds:0.5", Budget("seconds", 0.5), "seconds:0.5"),
    ],
)
def test_a_budget_is_read_and_written(text, budget, written):
    assert parse_budget(text) == budget
    assert str(budget) == written
    assert parse_budget(written) == budget


@pytest.mark.parametrize(
    "text", ["", "300", "seconds", "seconds:", "hours:3", "seconds:0", "tokens:-1", "flops:nan",
             "tokens:inf", "tokens:1e31", "tokens:1:2"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"--budget must be tokens:N or flops:N or seconds:N, wit"):
        parse_budget(text)


def test_words():
    assert Budget("tokens", 2e6).describe() == "2,000,000 tokens"
    assert Budget("flops", 1e15).describe() == "1e+15 training FLOPs"
    assert Budget("seconds", 2.5).describe() == "2.5 seconds of train steps"


def test_steps_are_the_fewest_that_spend_the_budget():
    config = small_config()
    tokens = 8 * 24
    of_flops = 8 * flops.train_flops(config.model, 24)
    for kind, cost in (("tokens", tokens), ("flops", of_flops), ("seconds", 0.25)):
        for amount, expected in ((cost / 9, 1), (cost, 1), (3 * cost, 3), (3.1 * cost, 4)):
            assert steps_for(Budget(kind, amount), config, 0.25) == expected


@pytest.mark.parametrize("name", ["no_split", "fac_split", "llama", "mamba1"])
def test_equal_flops_at_a_real_size(name):
    """The FLOPs of all steps exceed the budget by less than one step."""
    config = model_config("tiny", name)
    per_step = 8 * flops.train_flops(config.model, 256)
    steps = steps_for(Budget("flops", 1e13), config)
    assert 1e13 <= steps * per_step < 1e13 + per_step


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match=r"at most 2,147,483,647 steps; tokens:1e\+30 would be"):
        steps_for(Budget("tokens", 1e30), small_config())


def test_seconds_per_step_are_the_median_of_the_rounds():
    """One slow call in a round, and one slow round, change nothing."""
    rounds = [[0.1, 0.1, 9.0], [0.3, 0.2, 0.2], [7.0, 8.0, 9.0]]
    assert seconds_per_step({"seconds": {"train": each}} for each in rounds) == 0.2
