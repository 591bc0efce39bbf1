"""Prefill and single steps against one forward pass, for every model and split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax import models
from flowhn_jax.config import BASELINES
from flowhn_jax.split import STRATEGIES
from tests.slow import all_but
from tests.small import small_baseline, small_config

ALL = (*STRATEGIES, *BASELINES)
BOUNDED = tuple(name for name, strategy in STRATEGIES.items() if strategy.is_bounded)


def model_of(name, **split):
    if name in BASELINES:
        return small_baseline(name)
    return small_config(name, split=split, model={"vocab_size": 61}).model


def params_of(config, seed=None):
    seed = np.random.default_rng(seed).integers(2**31)
    return models.init(config, jax.random.key(seed))


def check_against_one_pass(config, tokens, lengths, segment_ids=None, room=None, padding="right"):
    """Compare prefill of `lengths` [B] tokens and steps through the rest with one pass over all."""
    params = params_of(config)
    batch, total = tokens.shape
    expected = np.asarray(models.forward(config, params, tokens, segment_ids))
    columns = max(lengths)
    prompts = np.full((batch, columns), 7)  # the padding's token must not matter
    ids = None if segment_ids is None else np.zeros_like(prompts)
    for row, length in enumerate(lengths):
        place = slice(length) if padding == "right" else slice(columns - length, columns)
        prompts[row, place] = tokens[row, :length]
        if ids is not None:
            ids[row, place] = segment_ids[row, :length]
    logits, cache = models.prefill(
        config, params, prompts, np.array(lengths), ids, length=room or total, padding=padding
    )
    positions, rows = np.array(lengths) - 1, np.arange(batch)
    found, wanted = [logits], [expected[rows, positions]]
    for _ in range(total - columns):  # every row continues for as many tokens, from its own length
        positions = positions + 1
        logits, cache = models.step(config, params, tokens[rows, positions], cache)
        found.append(logits)
        wanted.append(expected[rows, positions])
    np.testing.assert_array_equal(cache.tokens, positions + 1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.stack(found), np.stack(wanted), atol=1e-5 * max(1, scale))


@pytest.mark.parametrize(
    "name", all_but(["no_split", "fac_split", "fai_split", "llama", "mamba2", "hymba"], ALL)
)
def test_prompts_of_different_lengths_continue_at_their_own_positions(name, rng):
    config = model_of(name)
    tokens = rng.integers(0, config.vocab_size, (3, config.context))
    check_against_one_pass(config, tokens, [9, 1, 14])


@pytest.mark.parametrize(
    ("name", "error"),
    [("fac_split", 1e-6), pytest.param("hymba", 5e-6, marks=pytest.mark.slow)],
)
def test_padding_does_not_change_a_prompt(name, error, rng):
    """On either side, and with documents: logits and later steps are those of each prompt alone.

    Other shapes have other orders of summation, which shows in Hymba's layers.
    """
    config = model_of(name)
    params, lengths = params_of(config), [9, 4]
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    ids = 1 + (np.arange(9) >= 2) * np.ones((2, 1), int)
    for padding in ("right", "left"):
        order = (np.arange(9) - (9 - np.array(lengths))[:, None]) % 9
        rows = (np.take_along_axis(x, order, 1) if padding == "left" else x for x in (tokens, ids))
        tokens_in, ids_in = rows
        logits, cache = models.prefill(
            config, params, tokens_in, np.array(lengths), ids_in, length=12, padding=padding
        )
        then, _ = models.step(config, params, np.array([5, 6]), cache)
        for row, length in enumerate(lengths):
            part = slice(row, row + 1), slice(length)
            alone, cache = models.prefill(config, params, tokens[part], None, ids[part], length=12)
            np.testing.assert_allclose(logits[row], alone[0], atol=error * np.abs(alone).max())
            later, _ = models.step(config, params, np.array([5 + row]), cache)
            np.testing.assert_allclose(then[row], later[0], atol=error * np.abs(later).max())


@pytest.mark.parametrize(
    "name",
    all_but(
        ["fac_split", "fai_split", "mamba1", "hymba"],
        ["no_split", "fac_split", "fai_split", *BASELINES],
    ),
)
def test_only_the_last_document_of_a_packed_prompt_is_continued(name, rng):
    """Documents end among a branch's tokens, or begin where it has none yet."""
    config = model_of(name)
    if name == "hymba":  # only the first document follows the meta tokens directly
        starts = [(0, 0), (5, 9), (0, 0)]
    else:
        starts = [(4, 13), (5, 9), (0, 0)]
    tokens = rng.integers(0, config.vocab_size, (3, config.context))
    segment_ids = np.ones_like(tokens)
    for row, (second, third) in enumerate(starts):
        segment_ids[row, second:] += second > 0
        segment_ids[row, third:] += third > 0
    check_against_one_pass(config, tokens, [14, 10, 6], segment_ids)


@st.composite
def cases(draw):
    strategy = draw(st.sampled_from(tuple(STRATEGIES)))
    context = 20
    split = {"period": draw(st.integers(3, 9)), "stem": draw(st.integers(0, 1))}
    split["balance"] = draw(st.sampled_from(["flops", "equal", 0.2, 0.7]))
    if draw(st.booleans()):
        split["shift"] = draw(st.integers(0, split["period"] - 1))
    lengths = draw(st.lists(st.integers(1, context - 1), min_size=1, max_size=3))
    cuts = [draw(st.integers(0, length - 1)) for length in lengths] if draw(st.booleans()) else None
    ssm = draw(st.sampled_from(["mamba1", "mamba2"]))
    padding = draw(st.sampled_from(["left", "right"]))
    return strategy, context, split, lengths, cuts, ssm, padding, draw(st.integers(0, 99))


@pytest.mark.slow
@given(cases())
@settings(max_examples=6)
def test_any_split_of_any_prompts(case):
    strategy, context, split, lengths, cuts, ssm, padding, seed = case
    keys = {"context": context, "vocab_size": 61, "blocks": 2, "ssm": ssm}
    keys |= {"ssm_head_dim": 8} if ssm == "mamba2" else {}
    config = small_config(strategy, split=split, model=keys).model
    tokens = np.random.default_rng(seed).integers(0, 61, (len(lengths), context))
    segment_ids = None
    if cuts is not None:
        segment_ids = 1 + (np.arange(context) >= np.array(cuts)[:, None])
    check_against_one_pass(config, tokens, lengths, segment_ids, padding=padding)


@pytest.mark.parametrize("name", ["fac_split", "hymba"])
def test_steps_from_the_empty_cache(name, rng):
    config = model_of(name)
    params, tokens = params_of(config), rng.integers(0, config.vocab_size, (2, config.context))
    expected = models.forward(config, params, tokens)
    cache = models.init_cache(config, params, *tokens.shape)
    for position, column in enumerate(tokens.T):
        logits, cache = models.step(config, params, column, cache)
        np.testing.assert_allclose(logits, expected[:, position], atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fai_split", "learned_split", "no_split", "llama"])
def test_decoding_beyond_the_training_length(name, rng):
    config = model_of(name)
    tokens = rng.integers(0, config.vocab_size, (2, 2 * config.context + 3))
    check_against_one_pass(config, tokens, [20, 24])


@pytest.mark.parametrize("strategy", BOUNDED)
def test_a_bounded_split_ends_at_the_context(strategy):
    config = model_of(strategy)
    params, tokens = params_of(config), np.zeros((1, 5), int)
    with pytest.raises(ValueError, match=f"25 positions, but {strategy} was planned for a context"):
        models.prefill(config, params, tokens, length=25)
    with pytest.raises(ValueError, match="25 positions"):
        models.init_cache(config, params, 1, 25)


def test_caches_hold_only_the_tokens_of_attention():
    """Blocks with other numbers of tokens have caches of other sizes; the SSM's does not grow."""
    config = model_of("fac_split", balance=0.3)
    params = params_of(config)
    _, cache = models.prefill(config, params, np.zeros((2, 11), int), length=24)
    for block, plan in zip(cache.blocks, config.plan().blocks, strict=True):
        assert block.attention.kv.k.shape[2] == plan.attention.count(24) < 24
        assert list(block.attention.tokens) == [plan.attention.count(11)] * 2
    small, large = (models.init_cache(config, params, 2, length) for length in (2, 24))
    for a, b in zip(small.blocks, large.blocks, strict=True):
        assert jax.tree.map(jnp.shape, a.ssm) == jax.tree.map(jnp.shape, b.ssm)


@pytest.mark.parametrize("name", ["fai_split", "hymba"])
def test_bfloat16(name, rng):
    """The logits are near those of one pass, within the precision of bfloat16."""
    keys = {"dtype": "bfloat16", "vocab_size": 61}
    hymba = name == "hymba"
    config = small_baseline(name, **keys) if hymba else small_config(name, model=keys).model
    params = params_of(config)
    tokens = rng.integers(0, 61, (2, 20))
    expected = models.forward(config, params, tokens)
    logits, cache = models.prefill(config, params, tokens[:, :19], length=20)
    last, _ = models.step(config, params, tokens[:, 19], cache)
    for found, wanted in ((logits, expected[:, 18]), (last, expected[:, 19])):
        assert jnp.abs(found - wanted).max() < 0.05 * jnp.abs(expected).max()


def test_no_decoding_where_the_plan_depends_on_the_length():
    config = model_of("ae_split", scope="sequence")
    assert not models.can_decode(config)
    with pytest.raises(ValueError, match=r"scope must be 'context' for decoding; got 'sequence'"):
        models.init_cache(config, params_of(config), 1, 8)


def test_wrong_arguments():
    config = model_of("llama")
    params, tokens = params_of(config), np.zeros((1, 5), int)
    with pytest.raises(ValueError, match="length must be at least the prompts' 5 tokens; got 4"):
        models.prefill(config, params, tokens, length=4)
    with pytest.raises(ValueError, match="padding must be 'left' or 'right'; got 'both'"):
        models.prefill(config, params, tokens, padding="both")
