"""The options of the split, each with the promises that the default keeps."""

import numpy as np
import pytest

from flowhn_jax.split import reach
from tests.models.naive_flowhn import (
    CONTEXT,
    check_against_definition,
    check_prefixes,
    config_of,
    logits_of_changed_tokens,
    random_case,
    random_tokens,
)
from tests.models.test_decoding import check_against_one_pass

RESIDUAL = {"model": {"fusion": "residual"}}
BEST = {
    "model": {"fusion": "residual", "attention_rope_theta": 20.0, "attention_mlp_width": 40},
    "split": {"stem": 1, "stem_kind": "ssm"},
}
OPTIONS = {
    "best": ("fai_split", BEST),
    "paper": ("fac_split", {}),
    "residual": ("fai_split", RESIDUAL),
    "rotary": ("fai_split", {"model": {"attention_rope_theta": 20.0}}),
    "ssm_stem": ("fai_split", {"split": {"stem": 1, "stem_kind": "ssm"}}),
    "attention_stem": ("fac_split", {"split": {"stem": 1, "stem_kind": "attention"}}),
    "wide_attention": ("fa_split", {"model": {"attention_mlp_width": 40}}),
    "reads_all": ("fai_split", {"split": {"reads": "all"}}),
    "reads_all_mamba2": (
        "fai_split",
        {
            "model": {"ssm": "mamba2", "ssm_head_dim": 8, "ssm_groups": 2},
            "split": {"reads": "all", "stem": 1, "stem_kind": "attention"},
        },
    ),
    "reads_all_rotary": (
        "fac_split",
        {"model": {"attention_rope_theta": 20.0, "fusion": "residual"}, "split": {"reads": "all"}},
    ),
    "residual_no_split": ("no_split", RESIDUAL),
}


FAST = ("best", "reads_all_rotary")  # together they have every option


@pytest.fixture(
    scope="module",
    params=[
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS
    ],
)
def case(request):
    """Return the config of an option, and random parameters."""
    return random_case(config_of(*OPTIONS[request.param]))


def test_logits_and_gradients_are_those_of_the_definition(case, rng):
    """With two documents, in float32; gradients of the product with random cotangents."""
    config, params = case
    if config.is_mamba2:
        pytest.skip("the definition has Mamba-1")
    segment_ids = np.where(np.arange(CONTEXT) < rng.integers(2, CONTEXT), 1, 2)
    check_against_definition(config, params, random_tokens(config, rng), segment_ids, rng)


def test_reach_is_what_changed_tokens_change(case, rng):
    """Token j reaches logit i exactly where changing it changes the logits at i, and j <= i."""
    config, params = case
    logits, changed = logits_of_changed_tokens(config, params, rng)
    influence = np.any(changed != logits, axis=-1)  # [j, i]
    assert not np.tril(influence, -1).any(), "a token influences an earlier position"
    pairs = CONTEXT * (CONTEXT + 1) / 2
    assert influence.sum() / pairs == pytest.approx(reach(config.plan()))


def test_logits_of_a_prefix_do_not_change(case, rng):
    config, params = case
    check_prefixes(config, params, random_tokens(config, rng), (1, 7))


def test_decoding_gives_the_logits_of_one_pass(case, rng):
    """From prompts of different lengths, in the second of two documents."""
    config, _ = case
    tokens = random_tokens(config, rng, rows=3)
    segment_ids = 1 + (np.arange(CONTEXT) >= np.array([[2], [0], [5]]))
    check_against_one_pass(config, tokens, [5, 1, 8], segment_ids)
