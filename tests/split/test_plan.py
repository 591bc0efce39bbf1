import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowhn_jax.split import SplitConfig, attention_branch_flops, make_plan, ssm_branch_flops
from flowhn_jax.split.cost import balanced_tokens
from flowhn_jax.split.plan import partition_warning
from tests.split.strategies import DIMS, plans, splits


def positions(selection, length):
    return [position for position in range(length) if selection.contains(position)]


@given(plan=plans())
def test_each_position_is_in_exactly_one_branch(plan):
    for block in plan.blocks:
        attention = positions(block.attention, plan.length)
        ssm = positions(block.ssm, plan.length)
        if block.is_split:
            assert sorted(attention + ssm) == list(range(plan.length))
        else:
            assert attention == ssm == list(range(plan.length))
        assert block.attention.count(plan.length) == len(attention)
        assert block.ssm.count(plan.length) == len(ssm)


@given(plan=plans())
def test_runs_ascend_and_are_few(plan):
    for block in plan.blocks:
        for selection in (block.attention, block.ssm):
            edges = [edge for run in selection.runs for edge in run]
            assert edges == sorted(edges)
            assert all(0 <= start < stop <= selection.period for start, stop in selection.runs)
            assert len(selection.runs) <= 2


@given(split=splits(), context=st.integers(1, 60), data=st.data())
def test_prefix_has_the_prefix_of_the_plan(split, context, data):
    length = data.draw(st.integers(1, context))
    whole = make_plan(split, DIMS, blocks=4, context=context)
    prefix = make_plan(split, DIMS, blocks=4, context=context, length=length)
    for long, short in zip(whole.blocks, prefix.blocks, strict=True):
        assert positions(short.attention, length) == [
            position for position in positions(long.attention, context) if position < length
        ]


@given(split=splits(("fai_split",)), context=st.integers(8, 40), extra=st.integers(1, 40))
def test_interleaved_split_goes_on_beyond_the_context(split, context, extra):
    plan = make_plan(split, DIMS, blocks=3, context=context)
    longer = make_plan(split, DIMS, blocks=3, context=context, length=context + extra)
    assert plan.blocks == longer.blocks


def test_paper_dimensions_give_attention_576_of_1024():
    for strategy in ("fa_split", "fac_split", "fai_split"):
        plan = make_plan(SplitConfig(strategy), DIMS, blocks=2, context=1024)
        for block in plan.blocks:
            tokens = block.attention.count(1024)
            assert tokens == 576
            attention = attention_branch_flops(DIMS, tokens)
            ssm = ssm_branch_flops(DIMS, 1024 - tokens)
            assert abs(attention - ssm) / max(attention, ssm) < 0.02


def test_alternating_equal_halves():
    plan = make_plan(SplitConfig("ae_split"), DIMS, blocks=3, context=9)
    attention = [positions(block.attention, 9) for block in plan.blocks]
    assert attention == [[4, 5, 6, 7, 8], [0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_flop_aware_attention_is_last_in_every_block():
    split = SplitConfig("fa_split", balance=0.3, align=2)
    plan = make_plan(split, DIMS, blocks=3, context=20)
    assert [positions(block.attention, 20) for block in plan.blocks] == [list(range(14, 20))] * 3


def test_circulating_window_moves_back_and_wraps_in_order():
    split = SplitConfig("fac_split", balance=0.4, align=1)
    plan = make_plan(split, DIMS, blocks=6, context=10)
    assert [positions(block.attention, 10) for block in plan.blocks] == [
        [6, 7, 8, 9],
        [2, 3, 4, 5],
        [0, 1, 8, 9],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
        [6, 7, 8, 9],
    ]


@pytest.mark.parametrize(
    ("run", "shift", "starts"),
    [
        (4, None, [4, 2, 0, 6]),  # by half the run
        (5, None, [3, 1, 7, 5]),  # half an odd one is rounded down
        (1, None, [7, 6, 5, 4]),  # by 1 at least
        (3, 0, [5, 5, 5, 5]),
        (3, 1, [5, 4, 3, 2]),
        (2, 7, [6, 7, 0, 1]),
    ],
)
def test_interleaved_run_moves_back_by_its_shift(run, shift, starts):
    split = SplitConfig("fai_split", balance=run / 8, period=8, shift=shift)
    plan = make_plan(split, DIMS, blocks=4, context=16)
    for block, start in zip(plan.blocks, starts, strict=True):
        expected = {(start + offset) % 8 for offset in range(run)}
        assert {*positions(block.attention, 8)} == expected
        assert block.attention.count(16) == 2 * run


@given(
    context=st.integers(2, 200),
    share=st.floats(0.02, 0.98),
    align=st.integers(1, 64),
)
def test_circulating_window_really_circulates(context, share, align):
    """Over N / gcd(a, N) blocks the window ends everywhere a multiple of gcd away."""
    split = SplitConfig("fac_split", balance=share, align=align)
    tokens = make_plan(split, DIMS, blocks=1, context=context).blocks[0].attention.count(context)
    assume(0 < tokens < context)
    step = math.gcd(tokens, context)
    plan = make_plan(split, DIMS, blocks=context // step, context=context)
    visits = np.zeros(context, int)
    for block in plan.blocks:
        visits[positions(block.attention, context)] += 1
    assert (visits == tokens // step).all()
    assert len({block.attention for block in plan.blocks}) == context // step


@given(context=st.integers(3, 300), share=st.floats(0.02, 0.98), align=st.integers(1, 64))
def test_rounding_never_makes_the_circulating_split_swap_halves(context, share, align):
    assume(share != 0.5)
    plan = make_plan(
        SplitConfig("fac_split", balance=share, align=align), DIMS, blocks=4, context=context
    )
    assert not plan.is_partitioned


@given(period=st.integers(3, 80), share=st.floats(0.02, 0.98))
def test_rounding_never_makes_the_interleaved_split_repeat(period, share):
    split = SplitConfig("fai_split", balance=share, period=period)
    assert not make_plan(split, DIMS, blocks=4, context=1024).is_partitioned


@given(context=st.integers(128, 5000), strategy=st.sampled_from(["fa_split", "fac_split"]))
def test_attention_gets_an_aligned_number(context, strategy):
    plan = make_plan(SplitConfig(strategy, align=32), DIMS, blocks=1, context=context)
    assert plan.blocks[0].attention.count(context) % 32 == 0


def test_a_context_too_short_to_align_keeps_the_balance():
    plan = make_plan(SplitConfig("fa_split", align=64), DIMS, blocks=1, context=40)
    assert plan.blocks[0].attention.count(40) == balanced_tokens(DIMS, 40)


@pytest.mark.parametrize("strategy", ["ae_split", "fa_split"])
def test_splits_that_never_mix_are_warned_of(strategy):
    split = SplitConfig(strategy)
    plan = make_plan(split, DIMS, blocks=4, context=256)
    assert "nothing crosses" in partition_warning(split, plan)
    mixed = dataclasses.replace(split, stem=1)
    assert partition_warning(mixed, make_plan(mixed, DIMS, blocks=4, context=256)) is None


def test_equal_circulating_split_is_warned_of():
    split = SplitConfig("fac_split", balance="equal")
    assert make_plan(split, DIMS, blocks=4, context=256).is_partitioned


def test_stem_runs_before_the_strategy():
    split = SplitConfig("fac_split", stem=2, balance=0.25, align=1)
    plan = make_plan(split, DIMS, blocks=4, context=16)
    assert [block.is_split for block in plan.blocks] == [False, False, True, True]
    assert positions(plan.blocks[2].attention, 16) == [12, 13, 14, 15]


@pytest.mark.parametrize("strategy", ["ae_split", "fa_split", "fac_split"])
def test_beyond_the_context_is_refused(strategy):
    with pytest.raises(ValueError, match=r"has 65 positions.*context of 64.*fai_split"):
        make_plan(SplitConfig(strategy), DIMS, blocks=2, context=64, length=65)


def test_sequence_scope_plans_for_the_length():
    split = SplitConfig("ae_split", scope="sequence")
    plan = make_plan(split, DIMS, blocks=1, context=8, length=100)
    assert positions(plan.blocks[0].attention, 100) == list(range(50, 100))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy": "fac"}, r"'fac'; accepted are no_split, ae_split, fa_split"),
        ({"balance": "measured"}, r"'measured'; accepted are flops, equal, time"),
        ({"balance": 1.0}, r"share 1.0; accepted is 0 < share < 1"),
        ({"scope": "window"}, r"'window'; accepted are context, sequence"),
        ({"align": 0}, r"align is 0; accepted is 1 or more"),
        ({"period": 2}, r"period is 2; accepted is 3 or more"),
        ({"period": 8, "shift": 8}, r"shift is 8; accepted is 0 to split.period - 1 = 7"),
        ({"strategy": "fa_split_reference"}, r"needs split.scope='sequence'"),
    ],
)
def test_bad_choices_name_what_is_accepted(keys, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(**keys)
