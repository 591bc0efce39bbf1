import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import models, recipes
from flowhn_jax.models.loss import loss_sum
from flowhn_jax.split import STRATEGIES, reach
from tests.small import small_config
from tests.split.strategies import POSITIONAL

MAMBA2 = {"ssm": "mamba2", "ssm_head_dim": 8, "ssm_groups": 2}


@functools.cache
def small(strategy, ssm="mamba1", **split):
    model = MAMBA2 if ssm == "mamba2" else {}
    config = small_config(strategy, split=split, model=model).model
    return config, models.init(config, jax.random.key(0))


KINDS = [*((s, "mamba1") for s in POSITIONAL), ("fai_split", "mamba2")]
of_both_kinds = pytest.mark.parametrize(("strategy", "ssm"), KINDS)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 257, shape, np.int32)


@pytest.mark.parametrize(
    ("size", "strategy", "expected"),
    [
        ("135m", "no_split", 133_576_096),
        ("135m", "ae_split", 132_396_448),
        ("135m", "fa_split", 132_396_448),
        ("135m", "fac_split", 132_396_448),
        ("135m", "fai_split", 132_396_448),
        ("350m", "no_split", 359_845_440),
        ("350m", "fac_split", 353_553_984),
        ("1b", "no_split", 1_169_529_792),
        ("1b", "fac_split", 1_144_363_968),
    ],
)
def test_parameter_counts_match_the_paper(size, strategy, expected):
    config = config_lib.parse(recipes.load(f"flowhn_{size}", strategy)).model
    assert models.param_count(config) == expected


@of_both_kinds
def test_reach_matches_perturbations_of_the_model(strategy, ssm):
    """Token j reaches logit i exactly where changing it changes the logits at i, and j <= i."""
    config, params = small(strategy, ssm, balance=0.4)
    length = config.context
    base = random_tokens((1, length))
    changed = np.repeat(base, length, axis=0)
    changed[np.arange(length), np.arange(length)] ^= 1
    logits = models.forward(config, params, np.concatenate([base, changed]))
    influence = np.any(logits[1:] != logits[:1], axis=-1)  # [j, i]
    assert not np.tril(influence, -1).any(), "a token influences an earlier position"
    plan = config.plan()
    assert influence.sum() / (length * (length + 1) / 2) == pytest.approx(reach(plan))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [1, 13])
def test_logits_of_a_prefix_do_not_change(strategy, length):
    config, params = small(strategy)
    tokens = random_tokens((2, config.context))
    whole = models.forward(config, params, tokens)
    prefix = models.forward(config, params, tokens[:, :length])
    np.testing.assert_allclose(prefix, whole[:, :length], atol=2e-5)


@pytest.mark.parametrize("strategy", ["no_split", "fai_split"])
def test_length_beyond_the_context(strategy):
    config, params = small(strategy)
    tokens = random_tokens((1, 2 * config.context + 3))
    whole = models.forward(config, params, tokens)
    prefix = models.forward(config, params, tokens[:, : config.context])
    np.testing.assert_allclose(prefix, whole[:, : config.context], atol=2e-5)


@pytest.mark.parametrize(
    ("strategy", "ssm"),
    [kind if "fa" in kind[0] else pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_documents_never_attend_to_each_other(strategy, ssm):
    """Changing one packed document leaves the others' logits unchanged, bit for bit."""
    config, params = small(strategy, ssm)
    tokens = random_tokens((2, config.context))
    segment_ids = np.repeat(np.array([[1] * 9 + [2] * 8 + [3] * 7]), 2, axis=0)
    changed = np.where(segment_ids == 1, tokens ^ 1, tokens)
    before = models.forward(config, params, tokens, segment_ids)
    after = models.forward(config, params, changed, segment_ids)
    others = segment_ids != 1
    np.testing.assert_array_equal(before[others], after[others])
    assert (np.asarray(before != after)[~others]).any()

    def loss(params, tokens):
        logits = models.forward(config, params, tokens, segment_ids)
        return (logits[others] ** 2).sum()

    gradients = jax.jit(jax.grad(loss))
    for one, other in zip(
        jax.tree.leaves(gradients(params, tokens)["blocks"]),
        jax.tree.leaves(gradients(params, changed)["blocks"]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_packed_document_has_the_logits_of_the_document_alone():
    """True for no_split, whose branches see all tokens."""
    config, params = small("no_split")
    tokens = random_tokens((1, 20))
    segment_ids = np.array([[1] * 11 + [2] * 9])
    packed = models.forward(config, params, tokens, segment_ids)
    alone = models.forward(config, params, tokens[:, 11:])
    np.testing.assert_allclose(packed[:, 11:], alone, atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_activations_changes_no_gradient(remat):
    config, params = small("fac_split")
    tokens = random_tokens((2, config.context + 1))
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def gradients(remat):
        return jax.jit(jax.grad(lambda p: loss_sum(config, p, batch, remat=remat)))(params)

    stored, recomputed = gradients("none"), gradients(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), stored, recomputed)


def test_bfloat16_follows_float32():
    config, params = small("fac_split")
    tokens = random_tokens((2, config.context))
    exact = models.forward(config, params, tokens)
    rounded = models.forward(dataclasses.replace(config, dtype="bfloat16"), params, tokens)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05


def test_without_branch_mlps_only_the_mlps_are_missing():
    config, _ = small("fac_split")
    bare = dataclasses.replace(config, branch_mlp=False)
    mlps = 2 * config.blocks * (3 * config.width * config.mlp_width + config.width)
    assert models.param_count(config) - models.param_count(bare) == mlps
    params = models.init(bare, jax.random.key(0))
    assert models.forward(bare, params, random_tokens((1, 5))).shape == (1, 5, 257)


def test_initial_step_sizes_are_log_uniform():
    config = dataclasses.replace(small("fac_split")[0], width=512, heads=4)
    mixer = models.init(config, jax.random.key(3))["blocks"][0]["ssm"]["mixer"]
    steps = np.log(jax.nn.softplus(mixer["dt_bias"]))
    low, high = np.log([1e-3, 1e-1])
    assert low - 1e-3 <= steps.min() < low + 0.1
    assert high - 0.1 < steps.max() <= high + 1e-3
    assert abs(steps.mean() - (low + high) / 2) < 0.2
