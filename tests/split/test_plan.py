import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowhn_jax.split import (
    STRATEGIES,
    LearnedBlockPlan,
    Quota,
    SplitConfig,
    attention_branch_flops,
    make_plan,
    ssm_branch_flops,
)
from flowhn_jax.split.cost import balanced_tokens
from flowhn_jax.split.plan import partition_warning
from flowhn_jax.split.selection import circular_window
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


@pytest.mark.parametrize(
    ("start", "width", "runs"),
    [
        (7, 3, ((7, 10),)),
        (8, 3, ((0, 1), (8, 10))),
        (-3, 3, ((7, 10),)),
        (10, 2, ((0, 2),)),
        (0, 10, ((0, 10),)),
        (4, 0, ()),
    ],
)
def test_circular_window(start, width, runs):
    window = circular_window(start, width, 10)
    assert (window.period, window.runs, window.width) == (10, runs, width)


def test_plans_are_shared_and_cannot_be_changed():
    plan = make_plan(SplitConfig(), DIMS, blocks=1, context=64)
    assert plan is make_plan(SplitConfig(), DIMS, blocks=1, context=64)
    block = plan.blocks[0]
    for value, name in (
        (plan, "length"),
        (block, "ssm"),
        (block.ssm, "runs"),
        (SplitConfig(), "align"),
        (DIMS, "width"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, getattr(value, name))


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
def test_interleaved_split_continues_past_the_context(split, context, extra):
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
    """Over N / gcd(a, N) blocks the window starts once at each multiple of the gcd."""
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


@pytest.mark.parametrize(
    ("strategy", "balance", "align", "context", "tokens"),
    [
        ("fa_split", 0.5, 4, 20, 8),  # 8 and 12 are equally near: the smaller
        ("fa_split", 0.52, 4, 25, 12),
        ("fa_split", 0.99, 4, 20, 16),  # the SSM keeps some tokens
        ("fa_split", 0.01, 4, 20, 4),
        ("fa_split", 0.99, 1, 20, 19),
        ("fa_split", 0.01, 1, 20, 1),
        ("fa_split", 0.2, 20, 20, 4),  # no multiple of 20 is below 20
        ("fa_split", 0.2, 19, 20, 19),
        ("fa_split", "equal", 8, 22, 11),  # not aligned
        ("fac_split", 0.45, 5, 20, 5),  # 10 is nearest, but would only swap the halves
        ("fac_split", 0.55, 5, 20, 15),
        ("fac_split", 0.45, 10, 20, 9),
        ("fac_split", 0.5, 5, 20, 10),  # asked for
        ("fac_split", "equal", 8, 20, 10),
        ("fac_split", 0.4, 2, 5, 2),
    ],
)
def test_alignment(strategy, balance, align, context, tokens):
    split = SplitConfig(strategy, balance=balance, align=align)
    plan = make_plan(split, DIMS, blocks=1, context=context)
    assert positions(plan.blocks[0].attention, context) == [*range(context - tokens, context)]


@pytest.mark.parametrize(("share", "run"), [(0.01, 1), (0.99, 7), (0.3, 2), (0.32, 3), (0.5, 4)])
def test_interleaved_run_is_the_nearest_that_leaves_both_branches_some(share, run):
    split = SplitConfig("fai_split", balance=share, period=8)
    plan = make_plan(split, DIMS, blocks=1, context=1000)
    assert positions(plan.blocks[0].attention, 8) == [*range(8 - run, 8)]


def test_strategies_of_the_authors_code():
    """Attention gets the shorter half of an odd length, or 0.59 of all."""
    split = SplitConfig("alternating_reference", scope="sequence")
    plan = make_plan(split, DIMS, blocks=3, context=100, length=9)
    attention = [positions(block.attention, 9) for block in plan.blocks]
    assert attention == [[5, 6, 7, 8], [0, 1, 2, 3], [5, 6, 7, 8]]
    split = SplitConfig("fa_split_reference", scope="sequence")
    plan = make_plan(split, DIMS, blocks=2, context=8, length=200)
    assert [positions(block.attention, 200) for block in plan.blocks] == [[*range(118)]] * 2


def test_a_context_too_short_to_align_keeps_the_balance():
    plan = make_plan(SplitConfig("fa_split", align=64), DIMS, blocks=1, context=40)
    assert plan.blocks[0].attention.count(40) == balanced_tokens(DIMS, 40)


@pytest.mark.parametrize("strategy", ["ae_split", "fa_split"])
def test_splits_that_never_mix_have_a_warning(strategy):
    split = SplitConfig(strategy)
    plan = make_plan(split, DIMS, blocks=4, context=256)
    assert "nothing crosses" in partition_warning(split, plan)
    mixed = dataclasses.replace(split, stem=1)
    assert partition_warning(mixed, make_plan(mixed, DIMS, blocks=4, context=256)) is None


@pytest.mark.parametrize("balance", ["equal", 0.5])
def test_equal_circulating_split_is_partitioned(balance):
    split = SplitConfig("fac_split", balance=balance)
    assert make_plan(split, DIMS, blocks=4, context=256).is_partitioned


def test_a_single_block_is_partitioned():
    assert make_plan(SplitConfig("fac_split"), DIMS, blocks=1, context=256).is_partitioned


def test_blocks_without_a_split_have_no_warning():
    for split in (SplitConfig("no_split"), SplitConfig("fa_split", stem=2)):
        plan = make_plan(split, DIMS, blocks=2, context=16)
        assert not plan.is_partitioned
        assert partition_warning(split, plan) is None


def test_stem_runs_before_the_strategy():
    split = SplitConfig("fac_split", stem=2, balance=0.2, align=1)
    plan = make_plan(split, DIMS, blocks=4, context=20)
    assert [block.is_split for block in plan.blocks] == [False, False, True, True]
    assert positions(plan.blocks[2].attention, 20) == [16, 17, 18, 19]
    assert positions(plan.blocks[3].attention, 20) == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("kind", "tokens"), [("no_split", (20, 20)), ("ssm", (0, 20)), ("attention", (20, 0))]
)
def test_a_stem_of_any_kind_has_all_tokens(kind, tokens):
    split = SplitConfig("fa_split", stem=1, stem_kind=kind, balance=0.2, align=1)
    stem, block = make_plan(split, DIMS, blocks=2, context=20).blocks
    assert (stem.attention.count(20), stem.ssm.count(20)) == tokens
    without = make_plan(dataclasses.replace(split, stem=0, stem_kind="no_split"), DIMS, blocks=1,
                        context=20)  # fmt: skip
    assert (block,) == without.blocks
    plan = make_plan(split, DIMS, blocks=1, context=20)
    assert plan.blocks == (stem,)
    assert partition_warning(split, plan) is None


@pytest.mark.parametrize("strategy", ["ae_split", "fa_split", "fac_split"])
def test_bounded_strategies_refuse_longer_sequences(strategy):
    with pytest.raises(
        ValueError, match=r"has 65 positions.*context of 64.*\(no_split, fai_split, learned_split\)"
    ):
        make_plan(SplitConfig(strategy), DIMS, blocks=2, context=64, length=65)


@given(period=st.integers(3, 80), share=st.floats(0.02, 0.98), length=st.integers(1, 300))
def test_learned_split_has_a_quota(period, share, length):
    """As many tokens of every window, room for all that a last one can get, both branches some."""
    split = SplitConfig("learned_split", balance=share, period=period, stem=1)
    plan = make_plan(split, DIMS, blocks=3, context=1000, length=length)
    stem, first, second = plan.blocks
    assert isinstance(first, LearnedBlockPlan)
    assert first == second != stem
    assert not plan.is_partitioned
    width = first.attention.width
    assert width == min(max(round(round(share * 1000) / 1000 * period), 1), period - 1)
    assert first.reads == (first.attention, first.ssm)
    assert first.ssm == Quota(period, period - width)
    tail = length % period
    for quota in first.reads:
        assert quota.count(length) == length // period * quota.width + min(tail, quota.width)
    free = first.attention.count(length) + first.ssm.count(length) - length
    assert free == min(tail, width) + min(tail, period - width) - tail


def test_a_single_learned_block_has_no_other_that_mixes_its_sets():
    split = SplitConfig("learned_split")
    one, two = (make_plan(split, DIMS, blocks=blocks, context=64) for blocks in (1, 2))
    assert (one.is_partitioned, two.is_partitioned) == (True, False)
    assert one.is_learned
    assert not make_plan(SplitConfig("fai_split"), DIMS, blocks=2, context=64).is_learned
    all_in_stem = make_plan(dataclasses.replace(split, stem=2), DIMS, blocks=2, context=64)
    assert not all_in_stem.is_learned


def test_learned_split_reads_its_own_tokens():
    with pytest.raises(ValueError, match=r"reads must be 'own' for .*'learned_split'.*; got 'all'"):
        SplitConfig("learned_split", reads="all")


def test_unbounded_plans_take_longer_sequences():
    """Strategies for any length, and blocks that are all in the stem."""
    for split in (SplitConfig("no_split"), SplitConfig("fai_split"), SplitConfig(stem=2)):
        assert make_plan(split, DIMS, blocks=2, context=64, length=65).length == 65
    with pytest.raises(ValueError, match="has 65 positions"):
        make_plan(SplitConfig(stem=1), DIMS, blocks=2, context=64, length=65)
    assert make_plan(SplitConfig(), DIMS, blocks=2, context=64, length=64).length == 64


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_position_and_none(strategy):
    plan = make_plan(SplitConfig(strategy), DIMS, blocks=2, context=64, length=1)
    assert plan.length == 1
    for split in (SplitConfig(strategy), SplitConfig(strategy, scope="sequence")):
        with pytest.raises(ValueError, match="must have at least 1 position; got 0"):
            make_plan(split, DIMS, blocks=2, context=64, length=0)


def test_sequence_scope_plans_for_the_length():
    split = SplitConfig("ae_split", scope="sequence")
    plan = make_plan(split, DIMS, blocks=1, context=8, length=100)
    assert positions(plan.blocks[0].attention, 100) == list(range(50, 100))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"strategy": "fac"},
            r"strategy must be one of no_split, ae_split, .*alternating_reference; got 'fac'",
        ),
        ({"balance": "measured"}, r"balance must be flops, equal, time or .*; got 'measured'"),
        ({"balance": 1.0}, r"balance must be above 0 and below 1 .*; got 1.0"),
        ({"balance": 0.0}, r"balance must be above 0 and below 1 .*; got 0.0"),
        ({"scope": "window"}, r"scope must be context or sequence; got 'window'"),
        ({"align": 0}, r"align must be at least 1; got 0"),
        ({"period": 2}, r"period must be at least 3; got 2"),
        ({"stem": -1}, r"stem must be at least 0; got -1"),
        ({"shift": -1}, r"shift must be 0 to model.split.period - 1 = 63.*; got -1"),
        ({"period": 8, "shift": 8}, r"shift must be 0 to model.split.period - 1 = 7.*; got 8"),
        (
            {"strategy": "fa_split_reference"},
            r"scope must be 'sequence' for",
        ),
    ],
)
def test_bad_choices_are_refused_with_the_valid_ones(keys, message):
    with pytest.raises(ValueError, match=message):
        SplitConfig(**keys)


def test_choices_at_their_limits_are_valid():
    least = SplitConfig(balance=1e-9, align=1, period=3, shift=0, stem=0)
    assert dataclasses.replace(least, shift=2, balance=1 - 1e-9).shift == 2


def test_the_default_is_the_papers_circulating_split():
    assert SplitConfig() == SplitConfig(
        strategy="fac_split",
        balance="flops",
        align=64,
        period=64,
        shift=None,
        stem=0,
        scope="context",
    )
