"""The tables that `flowhn split` prints."""

import dataclasses

import jax
import pytest

from flowhn_jax import models
from flowhn_jax.commands import split
from flowhn_jax.commands.split import imbalance, lengths_table, table
from flowhn_jax.config import FlowHNConfig
from flowhn_jax.report import plots
from flowhn_jax.split import SplitConfig, attention_branch_flops, reach, ssm_branch_flops
from flowhn_jax.split.plan import partition_warning
from tests.small import small_baseline, small_config


def config_of(strategy, context=1024, **split):
    return FlowHNConfig(blocks=2, context=context, split=SplitConfig(strategy, **split))


def words_of(text, skipped=2):
    return [line.split() for line in text.splitlines()[skipped:]]


def test_imbalance_is_a_share_of_the_larger():
    assert imbalance(80, 100) == imbalance(100, 80) == 20
    assert imbalance(7, 7) == 0
    assert imbalance(0, 7) == 100


def test_table_is_that_of_the_readme():
    assert table(config_of("fac_split")).splitlines() == [
        "block  attention     SSM  attention      SSM  imbalance  attention's positions",
        "          tokens  tokens     MFLOPs   MFLOPs          %",
        "    0        576     448    7,645.0  7,680.9       0.47  448-1023",
        "    1        576     448    7,645.0  7,680.9       0.47  0-447 896-1023",
    ]


def test_positions_of_blocks_that_are_not_split_and_of_periods():
    config = config_of("fai_split", balance=0.25, period=8, stem=2)
    config = dataclasses.replace(config, blocks=3)
    assert table(config).splitlines()[0].endswith("attention's positions modulo 8")
    assert [row[:3] + row[6:] for row in words_of(table(config))] == [
        ["0", "1,024", "1,024", "all"],
        ["1", "1,024", "1,024", "all"],
        ["2", "256", "768", "6-7"],
    ]
    for kind, row in (("ssm", ["0", "1,024", "none"]), ("attention", ["1,024", "0", "all"])):
        split = dataclasses.replace(config.split, stem_kind=kind)
        stem = words_of(table(dataclasses.replace(config, split=split)))[0]
        assert stem[1:3] + stem[6:] == row
    config = config_of("no_split")
    assert table(config).splitlines()[0].endswith("attention's positions")
    assert [row[6] for row in words_of(table(config))] == ["all", "all"]
    one = words_of(table(config_of("ae_split", context=1)))
    assert [row[1:3] + row[5:] for row in one] == [
        ["1", "0", "100.00", "0-0"],
        ["0", "1", "100.00", "none"],
    ]


def test_a_learned_split_has_numbers_in_place_of_positions(capsys):
    config = config_of("learned_split", balance=0.25, period=8, stem=1, stem_kind="ssm")
    assert table(config).splitlines()[0].endswith("attention's positions")
    assert [row[1:3] + row[6:] for row in words_of(table(config))] == [
        ["0", "1,024", "none"],
        ["256", "768", *["2", "of", "every", "8,", "by", "score"]],
    ]
    split._print_plan(small_config("learned_split").model, [], None)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "reach 1.0000: share of pairs (i, j <= i) in which token j can reach logit i, depending on "
        "the text"
    )


def expected_pair(config, tokens, others):
    attention = attention_branch_flops(config.dims, tokens)
    ssm = ssm_branch_flops(config.dims, others)
    return [f"{tokens:,}", f"{100 * (1 - min(attention, ssm) / max(attention, ssm)):.3f}"]


@pytest.mark.parametrize(
    ("strategy", "planned"),
    # To multiples of 64, of which none is below 64; to runs at the end of each whole period.
    [("fa_split", (20, 320)), ("fac_split", (20, 320)), ("fai_split", (20, 300))],
)
def test_lengths_before_and_after_rounding(strategy, planned):
    split = {"balance": 0.31, "align": 64, "period": 64, "shift": 0, "stem": 2}
    config = dataclasses.replace(small_config(strategy, split=split).model, blocks=3)
    text = lengths_table(config, [64, 1000])
    first, _, *others = text.splitlines()
    assert {len(line) for line in others} == {len(first)}
    for row, length, exact, rounded in zip(
        words_of(text), (64, 1000), (20, 310), planned, strict=True
    ):
        share = reach(dataclasses.replace(config, context=length).plan())
        assert row == [
            f"{length:,}",
            *expected_pair(config, exact, length - exact),
            *expected_pair(config, rounded, length - rounded),
            f"{share:.4f}",
        ]


@pytest.mark.parametrize(("strategy", "tokens"), [("no_split", (9, 9)), ("ae_split", (4, 5))])
def test_strategies_that_use_no_balance_are_not_rounded(strategy, tokens):
    config = dataclasses.replace(small_config(strategy).model, blocks=2)
    (row,) = words_of(lengths_table(config, [9]))
    assert row[:5] == ["9", "-", "-", *expected_pair(config, *tokens)]


@pytest.mark.parametrize(
    ("strategy", "lengths"), [("fac_split", []), ("fac_split", ["24", "1000"]), ("ae_split", [])]
)
def test_what_is_printed(capsys, strategy, lengths):
    config = small_config(strategy, model={"blocks": 3}, split={"stem": 0}).model
    split._print_plan(config, lengths, None)
    planned = lengths_table(config, [24, 1000]) if lengths else table(config)
    plan = config.plan()
    warning = partition_warning(config.split, plan)
    assert (warning is not None) == (strategy == "ae_split")
    assert capsys.readouterr().out.splitlines() == [
        f"{models.param_count(config):,} parameters",
        f"{strategy}, context 24, balance flops, 3 blocks, stem 0",
        "",
        *planned.splitlines(),
        "",
        f"reach {reach(plan):.4f}: share of pairs (i, j <= i) in which token j reaches logit i",
        *([f"warning: {warning}"] if warning else []),
    ]


def test_the_picture_has_a_title(capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot_split", lambda *arguments: drawn.append(arguments))
    config = small_config("fai_split", model={"context": 1024}).model
    split._print_plan(config, [], "plan.svg")
    plan = config.plan()
    assert drawn == [(plan, f"fai_split: 1,024 tokens, reach {reach(plan):.3f}", "plan.svg")]
    assert capsys.readouterr().out.splitlines()[-1] == "wrote plan.svg"


@pytest.mark.parametrize("balance", ["flops", "equal", 0.3, "time"])
def test_only_a_measured_balance_needs_the_accelerator(capsys, monkeypatch, balance):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *arguments: updates.append(arguments))
    split._print_plan(small_config(split={"balance": balance}).model, [], None)
    assert updates == ([] if balance == "time" else [("jax_platforms", "cpu")])
    assert f", balance {balance}, " in capsys.readouterr().out


def test_each_length_has_its_own_reach_and_numbers_end_at_one_column():
    config = dataclasses.replace(small_config("fac_split", split={"align": 8}).model, blocks=2)
    rows = lengths_table(config, [24, 1000]).splitlines()[2:]
    reaches = [reach(dataclasses.replace(config, context=length).plan()) for length in (24, 1000)]
    assert f"{reaches[0]:.4f}" != f"{reaches[1]:.4f}"
    assert [row.split()[-1] for row in rows] == [f"{each:.4f}" for each in reaches]
    assert [row[:8].split() for row in rows] == [["24"], ["1,000"]]
    assert rows[0].index("24") + 2 == rows[1].index("1,000") + 5


def test_a_baseline_has_no_plan():
    with pytest.raises(ValueError, match=r"model.kind must be 'flowhn' for flowhn split; got 'll"):
        split._print_plan(small_baseline("llama"), [], None)
