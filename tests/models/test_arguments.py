"""Checks of the arguments of the models' public functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.config import BASELINES
from flowhn_jax.layers.decay import decay_rates
from flowhn_jax.models.loss import loss_sum
from tests.slow import all_but
from tests.small import small_baseline, small_config

CALLS = ("forward", "prefill", "step")


def call(name, config, params, tokens):
    """Call a function of `models` with tokens [B, T], or their first column."""
    if name == "step":
        cache = models.init_cache(config, params, 2, 8)
        return models.step(config, params, tokens[:, 0], cache)[0]
    found = getattr(models, name)(config, params, tokens)
    return found[0] if name == "prefill" else found


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", CALLS)
def test_token_ids_outside_the_vocabulary_are_refused(name, array):
    config = small_baseline("llama")
    params = models.init(config, jax.random.key(0))
    for wrong in (-1, 61, 2**20):
        tokens = array(np.full((2, 5), wrong, np.int32))
        with pytest.raises(ValueError, match=rf"{name}: tokens must be 0 to 60; got {wrong}\.$"):
            call(name, config, params, tokens)
    for valid in (0, 60):
        tokens = array(np.full((2, 5), valid, np.int32))
        assert jnp.isfinite(call(name, config, params, tokens)).all()


@pytest.mark.parametrize("wrong", [-1, 61])
@pytest.mark.parametrize("kind", all_but(["llama", "mamba1", "flowhn"], [*BASELINES, "flowhn"]))
def test_a_traced_id_outside_the_vocabulary_makes_logits_nan(kind, wrong):
    """No other row of the embedding replaces it, and the loss of a batch with it is NaN."""
    config = small_config().model if kind == "flowhn" else small_baseline(kind)
    wrong = config.vocab_size if wrong > 0 else wrong
    params = models.init(config, jax.random.key(0))
    tokens = np.zeros((2, 8), np.int32)
    tokens[1, 3] = wrong
    logits = jax.jit(lambda tokens: models.forward(config, params, tokens))(tokens)
    assert jnp.isfinite(logits[0]).all()
    assert jnp.isnan(logits[1, 3]).all()
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    assert jnp.isnan(jax.jit(lambda batch: loss_sum(config, params, batch))(batch))


@pytest.mark.parametrize("name", CALLS)
def test_other_arrays_of_tokens_are_refused(name):
    config = small_baseline("llama")
    params = models.init(config, jax.random.key(0))
    with pytest.raises(ValueError, match=r"tokens must be integers .*; got float32"):
        call(name, config, params, np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"tokens must be integers .*; got shape \(0"):
        call(name, config, params, np.zeros((0, 5), np.int32))
    with pytest.raises(ValueError, match=r"tokens must be integers .*; got list"):
        getattr(models, name)(config, params, [[1, 2]])


@pytest.mark.parametrize("wrong", [0, 6])
def test_lengths_outside_the_prompts_are_refused(wrong):
    config = small_baseline("llama")
    params, tokens = models.init(config, jax.random.key(0)), np.zeros((2, 5), np.int32)
    for given in ([np.array([1, wrong])], []):
        keywords = {} if given else {"lengths": np.array([1, wrong])}
        with pytest.raises(ValueError, match=f"prefill: lengths must be 1 to 5; got {wrong}"):
            models.prefill(config, params, tokens, *given, **keywords)


def test_functions_can_still_be_lowered():
    config = small_baseline("llama")
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    lowered = models.forward.lower(config, models.abstract_params(config), tokens)
    assert lowered.out_info.shape == (2, 5, 61)


def test_decay_rates_are_finite_for_every_parameter():
    a_log = jnp.array([-3.0, 0.0, 88.0, 89.0, jnp.inf])
    rates, gradient = jax.vjp(decay_rates, a_log)
    np.testing.assert_allclose(rates[:2], -np.exp([-3.0, 0.0]), rtol=1e-6)
    assert jnp.isfinite(rates).all()
    assert jnp.isfinite(gradient(jnp.zeros(5))[0]).all()
    np.testing.assert_array_equal(gradient(jnp.ones(5))[0][3:], 0)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_gradients_with_infinite_decay_rates_are_finite(kind):
    config = small_baseline(kind)
    params = models.init(config, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full_like(leaf, 200) if path[-1].key == "a_log" else leaf, params
    )
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    gradients = jax.jit(jax.grad(lambda params: loss_sum(config, params, batch)))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
