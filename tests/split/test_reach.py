import numpy as np
import pytest
from hypothesis import given

from flowhn_jax.split import STRATEGIES, SplitConfig, make_plan, reach
from tests.split.strategies import DIMS, plans


def reach_by_matrices(plan):
    """Return the reach by its definition: products of the blocks' reachability matrices [T, T]."""
    length = plan.length
    causal = np.tril(np.ones((length, length), bool))
    total = np.eye(length, dtype=bool)
    for block in plan.blocks:
        step = np.eye(length, dtype=bool)
        if block.reads_all:
            step |= causal
        for selection in (block.attention, block.ssm):
            chosen = np.array([selection.contains(position) for position in range(length)])
            step |= chosen[:, None] & chosen[None, :] & causal
        total = (step.astype(int) @ total.astype(int)) > 0
    return total.sum() / causal.sum()


@given(plan=plans())
def test_reach_agrees_with_its_definition(plan):
    assert reach(plan) == pytest.approx(reach_by_matrices(plan), abs=1e-12)


@pytest.mark.parametrize("length", [1, 5, 9, 14, 20])
@pytest.mark.parametrize(
    "split",
    [
        SplitConfig("fa_split", balance=0.5, align=1),  # attention has no token in the prefixes
        SplitConfig("fac_split", balance=0.3, align=1),
        SplitConfig("fai_split", balance=0.3, period=7, shift=1),
        SplitConfig("fai_split", balance=0.5, period=7, stem=1),
    ],
)
def test_reach_of_known_plans_and_prefixes(split, length):
    for blocks in (2, 3):
        plan = make_plan(split, DIMS, blocks=blocks, context=20, length=length)
        assert reach(plan) == pytest.approx(reach_by_matrices(plan), abs=1e-12)


def test_splits_that_never_mix_reach_one_half():
    for strategy in ("ae_split", "fa_split"):
        plan = make_plan(SplitConfig(strategy), DIMS, blocks=6, context=1024)
        assert 0.5 < reach(plan) < 0.51
    for strategy in ("no_split", "fac_split", "fai_split"):
        plan = make_plan(SplitConfig(strategy), DIMS, blocks=6, context=1024)
        assert reach(plan) == 1


@pytest.mark.parametrize("stem", [0, 1, 3])
def test_some_text_connects_each_pair_of_a_learned_split(stem):
    split = SplitConfig("learned_split", stem=stem, stem_kind="ssm" if stem else "no_split")
    for length in (1, 50, 64, 100):
        assert reach(make_plan(split, DIMS, blocks=4, context=64, length=length)) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stem", [0, 1])
def test_reach_of_a_long_context_needs_no_square_matrix(strategy, stem):
    plan = make_plan(SplitConfig(strategy, stem=stem), DIMS, blocks=6, context=131072)
    assert 0.49 < reach(plan) <= 1
