import json

import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import flops, models, recipes
from flowhn_jax.config import BASELINES
from flowhn_jax.split import STRATEGIES
from tests.small import keys

SIZES = ("tiny", "135m", "350m", "1b")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", SIZES)
def test_recipes_parse(size, strategy):
    config = config_lib.parse(recipes.load(f"flowhn_{size}", strategy))
    assert config.model.split.strategy == strategy
    assert config.model.split.stem == 0
    assert config.model.fusion == "paper"


@pytest.mark.parametrize("size", SIZES)
def test_each_token_of_the_best_split_passes_both_branches(size):
    """After a stem for all tokens; with fewer FLOPs than no_split, at most 4 % more parameters."""
    found, paper = (
        config_lib.parse(recipes.load(f"flowhn_{size}", name)) for name in ("best", "no_split")
    )
    assert found.train == paper.train
    *stem, one, other = found.model.plan().blocks
    assert stem
    assert {(block.attention.count(64), block.ssm.count(64)) for block in stem} == {(0, 64)}
    assert (one.attention, one.ssm) == (other.ssm, other.attention)
    assert models.param_count(found.model) < 1.04 * models.param_count(paper.model)
    train_flops = [flops.train_flops(each.model, found.model.context) for each in (found, paper)]
    assert train_flops[0] < train_flops[1]


@pytest.mark.parametrize("size", SIZES)
def test_baselines_have_flowhns_size(size):
    """All have no_split's parameters within 3 %, and the same head, data and recipe."""
    ours = config_lib.parse(recipes.load(f"flowhn_{size}", "no_split"))
    count = models.param_count(ours.model)
    print(f"{'no_split':<10} {count:>13,}")
    for kind in BASELINES:
        theirs = config_lib.parse(recipes.load(f"baseline_{size}", kind))
        found = models.param_count(theirs.model)
        print(f"{kind:<10} {found:>13,} {100 * (found / count - 1):+.2f} %")
        assert abs(found / count - 1) < 0.03, kind
        assert theirs.model.kind == kind
        for key in ("vocab_size", "width", "context", "init_std", "dtype"):
            assert getattr(theirs.model, key) == getattr(ours.model, key)
        assert (theirs.train, theirs.data) == (ours.train, ours.data)


def test_unknown_baseline():
    with pytest.raises(ValueError, match=r"one of llama, mamba1, .*falcon_h1; got 'lama'"):
        recipes.load("baseline_tiny", "lama")


def test_unknown_split():
    with pytest.raises(ValueError, match=r"one of no_split, .*d_split, best; got 'fax_split'"):
        recipes.load("flowhn_tiny", "fax_split")
    with pytest.raises(ValueError, match=r"best, heads12; got 'heads24'"):
        recipes.load("flowhn_135m", "heads24")


def test_default_strategy_is_fac_split():
    assert recipes.load("flowhn_tiny").model.split.strategy == "fac_split"


def test_12_heads_have_the_papers_size():
    paper, ours = (
        config_lib.parse(recipes.load("flowhn_135m", variant)).model
        for variant in ("fac_split", "heads12")
    )
    assert [(model.heads, model.kv_heads) for model in (paper, ours)] == [(32, 8), (12, 3)]
    assert models.param_count(paper) == models.param_count(ours)
    assert paper.plan() == ours.plan()


def test_round_trip_through_json():
    config = config_lib.parse(recipes.load("flowhn_135m", "fai_split"))
    assert config_lib.parse(json.loads(json.dumps(config_lib.to_dict(config)))) == config


def test_default_holds_every_key():
    assert config_lib.parse(config_lib.default()) == config_lib.Config()


def test_numerals_serve_as_shares_and_integers_as_floats():
    config = config_lib.parse({"model": {"split": {"balance": "0.3"}}, "train": {"clip_norm": 1}})
    assert config.model.split.balance == 0.3
    assert config.train.clip_norm == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modle": {}}, r"'modle'; the nearest is 'model'"),
        ({"model": {"split": {"periode": 3}}}, r"'model.split.periode'; .*'model.split.period'"),
        ({"model": {"width": "wide"}}, r"model.width must be int; got 'wide' \(str\)"),
        ({"model": {"width": True}}, r"model.width must be int; got True \(bool\)"),
        ({"model": {"width": 33.5}}, r"model.width must be int; got 33.5 \(float\)"),
        ({"model": 3}, r"model must be a group of config keys; got 3"),
        ({"model": {"width": 100}}, r"a multiple of model.heads \(32\), e.g. 96 or 128; got 100"),
        ({"model": {"width": 16}}, r"multiple of model.heads \(32\), e.g. 32; got 16"),
        ({"model": {"heads": 12, "width": 768}}, r"kv_heads \(8\), e.g. 8 or 16; got 12"),
        ({"model": {"blocks": 0}}, r"model.blocks must be above 0; got 0"),
        ({"model": {"ssm": "mamba3"}}, r"model.ssm must be one of mamba1, mamba2; got 'mamba3'"),
        ({"model": {"fusion": "sum"}}, r"model.fusion must be one of paper, residual; got 'sum'"),
        (
            {"model": {"attention_mlp_width": -1}},
            r"model.attention_mlp_width must be 0 or above; got -1",
        ),
        (
            {"model": {"attention_mlp_width": 9, "branch_mlp": False}},
            r"model.attention_mlp_width must be 0 where model.branch_mlp is False; got 9",
        ),
        (
            {"model": {"attention_rope_theta": -1.0}},
            r"model.attention_rope_theta must be 0 or above; got -1.0",
        ),
        (
            {"model": {"attention_rope_theta": 10.0, "head_dim": 5}},
            r"head_dim\) must be even for model.attention_rope_theta; got 5",
        ),
        (
            {"model": {"ssm": "mamba2", "ssm_head_dim": 80}},
            r"head_dim must .*\(1536\); got 80",
        ),
        ({"model": {"ssm": "mamba2", "ssm_groups": 5}}, r"ssm_groups must .* \(24\); got 5"),
        ({"kernels": {"backend": "fast"}}, r"kernels.backend: .* 'auto', 'xla' or OPER"),
        ({"kernels": {"backend": "scan=xla"}}, r"operation must be one of .*; got 'scan'"),
        ({"kernels": {"backend": "ssd=cudnn"}}, r"ssd: .* one of .*'xla'; got 'cudnn'"),
        ({"model": {"dtype": "float16"}}, r"one of auto, float32, bfloat16"),
        ({"model": {"split": {"stem": 3}}}, r"split.stem must be 0 to model.blocks \(2\); got 3"),
        (
            {"model": {"split": {"stem": 1, "stem_kind": "mamba"}}},
            r"split.stem_kind must be no_split or ssm or attention; got 'mamba'",
        ),
        (
            {"model": {"split": {"reads": "all", "balance": "time"}}},
            r"split.balance must not be 'time' for model.split.reads 'all'",
        ),
        (
            {"model": {"split": {"reads": "all", "strategy": "no_split"}}},
            r"split.reads must be 'own' for the strategy 'no_split'",
        ),
        (
            {"model": {"split": {"stem_kind": "ssm"}}},
            r"split.stem must be at least 1 for model.split.stem_kind 'ssm'; got 0",
        ),
        ({"train": {"batch_size": 10, "accumulate": 4}}, r"accumulate \(4\), e.g. 8 or 12"),
        ({"train": {"remat": "some"}}, r"one of none, dots, full"),
        ({"train": {"moment_dtype": "float16"}}, r"train.moment_dtype must be one of float32, bfl"),
        ({"train": {"warmup": 1.5}}, r"train.warmup must be 0 to 1; got 1.5"),
        (
            {"train": {"learning_rate": float("nan")}},
            r"learning_rate must be a finite number; got nan",
        ),
        ({"train": {"learning_rate": "-inf"}}, r"learning_rate must be float; got '-inf' \(str\)"),
        ({"train": {"clip_norm": float("inf")}}, r"clip_norm must be a finite number; got inf"),
        (
            {"train": {"clip_norm": 10**400}},
            r"clip_norm must be .*; got an integer of more than 40 digits",
        ),
        ({"model": {"width": 10**30}}, r"width must be at most 2147483647; got 10{30}\."),
        ({"model": {"width": 10**5000}}, r"model.width must be .*; got an integer of more than 40"),
        ({"model": {"width": 1e300}}, r"model.width must be .*; got an integer of more than 40"),
        ({"model": {"width": "x" * 10**6}}, r"model.width must be int; got 'x{37}\.\.\.x{38}'"),
        ({"model": {"context": 2**24 + 1}}, r"context must be at most 16777216; got 16777217"),
        ({"model": {"blocks": 1025}}, r"model.blocks must be at most 1024; got 1025"),
        ({"model": {"ssm_expand": 1e300}}, r"at most 2147483647 / model.width; got 1e\+300"),
        (
            {"model": {"split": {"balance": "nan"}}},
            r"split.balance must be a finite number; got nan",
        ),
        ([1], r"top level must be a group of config keys; got \[1\]"),
        ({"mesh": {"data": 0}}, r"mesh.data must be -1 or above 0; got 0"),
        ({"model": {"kind": "lama"}}, r"kind must be one of flowhn, llama, .*; got 'lama'"),
        ({"model": {"kind": "llama", "ssm_state": 8}}, r"ssm_state must .*default, 16, .*; got 8"),
        (
            {"model": {"window": 8}},
            r"window must .* 1024, for .*'flowhn', .*; got 8",
        ),
        ({"model": {"kind": "llama", "split": {"stem": 1}}}, r"model.split must be .*not read it"),
        ({"model": {"kind": "jamba", "attention_offset": 8}}, r"offset must be 0 to .* = 7; got 8"),
        ({"model": {"kind": "llama", "head_dim": 7}}, r"head_dim\) must be even .*; got 7"),
        ({"model": {"kind": "hymba", "heads": 40}}, r"heads must be a divisor .*\(1536\); got 40"),
        ({"model": {"ssm_expand": 1.3, "width": 32}}, r"model.width \(32\) is whole; got 1.3"),
        (
            {"model": {"kind": "llama"}, "mesh": {"branch": 2}},
            r"must be 1 for .*'llama'.*; got 2",
        ),
    ],
)
def test_messages_say_what_a_value_must_be(config, message):
    with pytest.raises(ValueError, match=message):
        config_lib.parse(config)


def test_a_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("FLOWHN_KERNELS_BACKEND", "attention=flash")
    with pytest.raises(ValueError, match=r"FLOWHN_KERNELS_BACKEND: attention: .*; got 'flash'"):
        config_lib.parse({})


def test_differences_are_named():
    old = {"model": {"width": 3, "split": {"stem": 0}}, "seed": 1}
    new = {"model": {"width": 4, "split": {"stem": 0}}, "rate": 2}
    assert config_lib.differences(old, new) == [
        "model.width: 3 -> 4",
        "rate: None -> 2",
        "seed: 1 -> None",
    ]


def test_recipes_are_all_tested():
    tested = {f"{family}_{size}" for family in ("flowhn", "baseline") for size in SIZES}
    assert set(recipes.names()) == tested


def test_every_key_has_a_description():
    described = config_lib.describe_keys()

    assert set(described) == set(keys(config_lib.to_dict(config_lib.Config())))
    missing = [key for key, (_, _, text) in described.items() if not text.split(" Only for")[0]]
    assert not missing
    kind, default, text = described["model.window"]
    assert (kind, default) == ("int", 1024)
    assert text.endswith("Only for model.kind hymba.")


def test_a_models_dict_has_the_keys_of_all_families():
    """Runs of earlier code have them all in their config.json, too."""
    config = config_lib.parse({"model": {"kind": "llama", "rope_theta": 500.0}})
    written = config_lib.to_dict(config)
    assert written["model"].keys() == config_lib.to_dict(config_lib.Config())["model"].keys()
    assert (written["model"]["kind"], written["model"]["rope_theta"]) == ("llama", 500.0)
    assert config_lib.parse(written) == config
    assert not hasattr(config.model, "window")


def test_the_command_that_needs_flowhn_is_named():
    config = config_lib.parse({"model": {"kind": "llama"}}).model
    with pytest.raises(ValueError, match=r"model.kind must be 'flowhn' for X; got 'llama'"):
        config_lib.require_flowhn(config, "X")
    with pytest.raises(ValueError, match=r"model.kind must be 'flowhn' for a plan .*'llama'"):
        config.plan()
