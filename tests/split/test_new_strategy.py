"""A new strategy is one class: this file adds one, plans with it and trains a model with it."""

import dataclasses

import jax
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.models.loss import loss_sum
from flowhn_jax.split import (
    PARITY_STRATEGIES,
    STRATEGIES,
    Selection,
    SplitConfig,
    Strategy,
    get_strategy,
    make_plan,
    reach,
    register,
)
from tests.small import small_config
from tests.split.strategies import DIMS

PERIOD = 3


class EveryThird(Strategy):
    """Attention gets every third position, one further back in each block."""

    name = "every_third"
    uses_balance = False
    is_bounded = False

    def selection(self, block):
        start = -block % PERIOD
        return Selection(PERIOD, ((start, start + 1),))


class FirstTokens(Strategy):
    """Attention gets the first positions, as many as the balance gives it."""

    name = "first_tokens"

    def selection(self, block):
        return Selection(self.length, ((0, self.aligned_tokens()),))


@pytest.fixture(autouse=True)
def _registered():
    added = [register(strategy) for strategy in (EveryThird, FirstTokens)]
    yield
    for strategy in added:
        del STRATEGIES[strategy.name]
    make_plan.cache_clear()


def test_it_is_known_by_its_name():
    assert get_strategy("every_third") is STRATEGIES["every_third"] is EveryThird
    assert SplitConfig("every_third").strategy_class is EveryThird
    for name in (*STRATEGIES, *PARITY_STRATEGIES):
        with pytest.raises(ValueError, match=rf"strategy must be one of .*\b{name}\b.*; got 'new'"):
            SplitConfig("new")
    with pytest.raises(ValueError, match="'every_third' is registered already"):
        register(EveryThird)


def test_plan():
    plan = make_plan(SplitConfig("every_third", stem=1), DIMS, blocks=4, context=8, length=20)
    assert [block.is_split for block in plan.blocks] == [False, True, True, True]
    for block, start in zip(plan.blocks[1:], (0, 2, 1), strict=True):
        selected = [position for position in range(20) if block.attention.contains(position)]
        assert selected == [*range(start, 20, 3)]
        assert block.ssm == block.attention.complement()
    assert not plan.is_partitioned


@pytest.mark.parametrize("strategy", [*STRATEGIES, "every_third", "first_tokens"])
def test_properties_agree_with_the_plans(strategy):
    """What a class says of itself is what its plans do."""
    split = SplitConfig(strategy, balance=0.3, align=1)
    plan = make_plan(split, DIMS, blocks=3, context=20)
    other = make_plan(dataclasses.replace(split, balance=0.7), DIMS, blocks=3, context=20)
    assert split.strategy_class.uses_balance == (plan != other)
    assert split.strategy_class.is_split == any(block.is_split for block in plan.blocks)
    assert split.strategy_class.is_learned == plan.is_learned
    if split.strategy_class.is_bounded:
        with pytest.raises(ValueError, match="every_third"):  # one that takes any length
            make_plan(split, DIMS, blocks=3, context=20, length=21)
    else:
        longer = make_plan(split, DIMS, blocks=3, context=20, length=21)
        assert longer.blocks == plan.blocks


@pytest.mark.parametrize("strategy", ["every_third", "first_tokens"])
def test_model_is_causal_and_reaches_what_the_plan_says(strategy):
    config = small_config(strategy, split={"balance": 0.4}).model
    params = models.init(config, jax.random.key(0))
    length = config.context
    base = np.random.default_rng(0).integers(0, 257, (1, length), np.int32)
    changed = np.repeat(base, length, axis=0)
    changed[np.arange(length), np.arange(length)] ^= 1
    logits = models.forward(config, params, np.concatenate([base, changed]))
    influence = np.any(logits[1:] != logits[:1], axis=-1)  # [j, i]
    assert not np.tril(influence, -1).any(), "a token influences an earlier position"
    assert influence.sum() / (length * (length + 1) / 2) == pytest.approx(reach(config.plan()))


def test_model_learns():
    config = small_config("every_third").model
    params = models.init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 257, (2, config.context + 1), np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    loss = jax.jit(jax.value_and_grad(lambda params: loss_sum(config, params, batch)))
    losses = []
    for _ in range(5):
        value, gradients = loss(params)
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
