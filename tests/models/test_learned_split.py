"""The learned split: the definition token by token, causality, exact decoding, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax import models
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.router import Router, gate_update
from tests.models.naive_flowhn import (
    CONTEXT,
    check_against_definition,
    check_prefixes,
    config_of,
    learned_routes,
    logits_of_changed_tokens,
    random_case,
    random_tokens,
)
from tests.models.test_decoding import check_against_one_pass

RECIPES = {
    "best": {
        "model": {"blocks": 3, "fusion": "residual", "attention_rope_theta": 20.0},
        "split": {"stem": 1, "stem_kind": "ssm"},
    },
    "paper": {},
    "mamba2": {"model": {"ssm": "mamba2", "ssm_head_dim": 8, "fusion": "residual"}},
}


@pytest.fixture(
    scope="module",
    params=["best", *(pytest.param(n, marks=pytest.mark.slow) for n in ("paper", "mamba2"))],
)
def case(request):
    """Return a config with two learned blocks, and random parameters."""
    return random_case(config_of("learned_split", RECIPES[request.param]))


def test_logits_and_gradients_are_those_of_the_definition(case, rng):
    """With two documents, in float32; the routers' gradients included, which are not zero."""
    config, params = case
    if config.is_mamba2:
        pytest.skip("the definition has Mamba-1")
    tokens = random_tokens(config, rng, rows=1)
    segment_ids = np.where(np.arange(CONTEXT) < rng.integers(2, CONTEXT), 1, 2)
    routes = learned_routes(config, params, tokens, segment_ids)
    for attends in routes[config.split.stem :]:
        assert list(attends[:10].reshape(2, 5).sum(1)) == [2, 2]

    gradients = check_against_definition(config, params, tokens, segment_ids, rng, routes)
    for block in list(gradients["blocks"].values())[config.split.stem :]:
        for gradient in block["router"].values():
            assert np.isfinite(gradient).all()
            assert np.abs(gradient).max() > 1e-6


def test_no_token_influences_an_earlier_one(case, rng):
    """Each token is changed in a row of its own: its route and all routes after it may change."""
    config, params = case
    logits, changed = logits_of_changed_tokens(config, params, rng)
    changes = np.abs(changed - logits).max(-1)  # [j, i]
    influence = changes > 1e-6 * np.abs(changed).max()  # rows differ in the rounding of products
    assert not np.tril(influence, -1).any()
    assert influence.diagonal().all()
    assert influence.sum() > 2 * CONTEXT


def test_logits_of_a_prefix_do_not_change(case, rng):
    """Also of a text beyond the context."""
    config, params = case
    tokens = random_tokens(config, rng, length=2 * CONTEXT + 3)
    check_prefixes(config, params, tokens, (1, 7, CONTEXT))


def test_decoding_gives_the_logits_of_one_pass(case, rng):
    """From prompts of different lengths, in the second of two documents, padded on the left."""
    config, _ = case
    tokens = random_tokens(config, rng, rows=3)
    segment_ids = 1 + (np.arange(CONTEXT) >= np.array([[2], [0], [5]]))
    check_against_one_pass(config, tokens, [5, 1, 8], segment_ids, padding="left")


def test_decoding_from_the_empty_cache(case, rng):
    config, params = case
    tokens = random_tokens(config, rng)
    expected = models.forward(config, params, tokens)
    cache = models.init_cache(config, params, *tokens.shape)
    for position, column in enumerate(tokens.T):
        logits, cache = models.step(config, params, column, cache)
        np.testing.assert_allclose(logits, expected[:, position], atol=5e-5, rtol=1e-5)


def test_caches_count_the_tokens_of_each_branch(case, rng):
    """A block has room for what its windows can hold, and knows what its last window holds."""
    config, params = case
    tokens, lengths = random_tokens(config, rng, rows=3), np.array([5, 8, 12])
    _, cache = models.prefill(config, params, tokens, lengths)
    for block, plan in zip(cache.blocks, config.plan().blocks, strict=True):
        if not plan.is_split or not hasattr(block, "attended"):
            continue
        assert block.attention.kv.k.shape[2] == plan.attention.count(CONTEXT) == 6
        np.testing.assert_array_equal(
            block.attention.tokens, 2 * (lengths // 5) + np.asarray(block.attended)
        )
        assert block.attended[0] == 0
        assert (block.attended <= np.minimum(lengths % 5, 2)).all()


def test_documents_pass_on_the_places_that_they_leave_and_nothing_else(case, rng):
    """One ends in the middle of a window: the next one's logits depend on the counts alone."""
    config, params = case
    rows, cut = 48, 7
    tokens = random_tokens(config, rng, rows=rows)
    tokens[:, cut:] = tokens[0, cut:]
    segment_ids = np.where(np.arange(CONTEXT) < cut, 1, 2) * np.ones((rows, 1), int)
    logits = np.asarray(models.forward(config, params, tokens, segment_ids))
    _, cache = models.prefill(config, params, tokens[:, :cut])
    counts = np.stack(
        [block.attended for block in cache.blocks if hasattr(block, "attended")], axis=1
    )
    groups = [np.flatnonzero((counts == each).all(1)) for each in np.unique(counts, axis=0)]
    assert max(map(len, groups)) > 1
    for group in groups:
        expected = np.broadcast_to(logits[group[:1], cut:], logits[group, cut:].shape)
        atol = 1e-6 * np.abs(logits).max()
        np.testing.assert_allclose(logits[group, cut:], expected, rtol=0, atol=atol)
    assert np.unique(logits[:, 0, 0]).size > 1


def test_bfloat16_follows_float32(case, rng):
    """With scores of 0, so that windows alone decide.

    Other scores differ by the rounding of the router's input, and may lie on both sides of 0.
    """
    config, params = case
    params = jax.tree.map(lambda leaf: leaf, params)
    for block in params["blocks"].values():
        if "router" in block:
            block["router"] = jax.tree.map(jnp.zeros_like, block["router"])
    tokens = random_tokens(config, rng)
    exact = models.forward(config, params, tokens)
    rounded_config = dataclasses.replace(config, dtype="bfloat16")
    rounded = models.forward(rounded_config, params, tokens)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.04  # 0.013 in the median of 360 cases, at most 0.023
    logits, cache = models.prefill(rounded_config, params, tokens[:, :8], length=CONTEXT)
    step, _ = models.step(rounded_config, params, tokens[:, 8], cache)
    for found, position in ((logits, 7), (step, 8)):
        difference = np.abs(found - rounded[:, position]).max()
        assert difference < 0.05 * np.abs(rounded).max()


def test_the_gate_and_its_gradient(rng):
    """Against the formula in float64, whose derivative is a difference quotient."""
    x, y = rng.normal(size=(2, 5, 3))
    scores, attends = rng.normal(size=5), rng.random(5) < 0.5

    def formula(scores):
        signed = np.where(attends, scores, -scores)
        return x + 2 / (1 + np.exp(-signed))[:, None] * (y - x)

    arrays = [jnp.asarray(each, jnp.float32) for each in (x, y, scores)]
    np.testing.assert_allclose(gate_update(*arrays, attends), formula(scores), atol=1e-6)
    gradient = jax.grad(lambda s: gate_update(*arrays[:2], s, attends).sum())(arrays[2])
    step = 1e-5
    quotient = (formula(scores + step) - formula(scores - step)).sum(1) / (2 * step)
    np.testing.assert_allclose(gradient, quotient, atol=1e-5)
    zero = gate_update(*arrays[:2], jnp.zeros(5), attends)
    np.testing.assert_allclose(zero, y, atol=1e-6)


def test_scores_pass_at_first_as_often_as_attention_has_tokens(rng):
    """With the share of a quota, for random tokens."""
    context = LayerContext(nnx.Rngs(0), jnp.dtype("float32"), init_std=0.02, norm_eps=1e-6)
    x = rng.normal(size=(4000, 256)).astype(np.float32)
    for share in (0.25, 0.5, 0.9):
        router = Router(256, share, context)
        assert abs(float((router(x) > 0).mean()) - share) < 0.05  # deviation: at most 0.025
