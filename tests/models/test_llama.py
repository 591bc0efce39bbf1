"""The options of Llama: biases, norms of queries and keys, scaled rotary frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.checkpoints.optimizer import decay_mask
from flowhn_jax.config import MeshConfig
from flowhn_jax.models.loss import loss_sum
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import parameter_spec, with_shardings
from tests.small import small_baseline

YARN = {"type": "yarn", "factor": 4.0, "original_context": 8}
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_context": 16}
DYNAMIC = {
    "context": 16,
    "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_context": 16},
}
ALL = {"attention_bias": "all", "mlp_bias": True, "qk_norm": True, "rope_scaling": YARN}
OPTIONS = {
    "all": ALL,
    "qwen2": {"attention_bias": "qkv", "rope_scaling": LLAMA3},
    "dynamic": DYNAMIC,
}


def random_params(config, rng):
    """Return random parameters, also for norms and biases."""
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32),
        models.init(config, jax.random.key(0)),
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_and_steps_match_one_pass(name, rng):
    config = small_baseline("llama", **OPTIONS[name])
    params, length = random_params(config, rng), config.context
    tokens = rng.integers(0, config.vocab_size, (2, length))
    expected = np.asarray(models.forward(config, params, tokens))
    logits, cache = models.prefill(config, params, tokens[:, :9], length=length)
    found = [logits]
    for position in range(9, length):
        logits, cache = models.step(config, params, tokens[:, position], cache)
        found.append(logits)
    error = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(np.stack(found, 1), expected[:, 8:], atol=error)


def test_documents_never_attend_to_each_other(rng):
    config = small_baseline("llama", **ALL)
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (2, config.context))
    segment_ids = np.repeat([[1, 2]], [9, 15], axis=1).repeat(2, axis=0)
    packed = np.asarray(models.forward(config, params, tokens, segment_ids))
    error = 1e-5 * np.abs(packed).max()
    for part in (slice(0, 9), slice(9, None)):
        alone = models.forward(config, params, tokens[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=error)


def test_every_option_changes_the_logits(rng):
    """Without it, of the same parameters."""
    config = small_baseline("llama", **ALL)
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (2, config.context))
    expected = np.asarray(models.forward(config, params, tokens))

    def changed(without, **keys):
        kept = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros_like(x) if without in jax.tree_util.keystr(path) else x,
            params,
        )
        other = small_baseline("llama", **ALL | keys)
        return np.abs(np.asarray(models.forward(other, kept, tokens)) - expected).max()

    for bias in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert changed(f"['{bias}']['bias']") > 1e-3, bias
    assert changed("['q_norm']") > 1e-3
    linear = {"type": "linear", "factor": 2.0}
    for scaling in ({}, linear, LLAMA3, YARN | {"factor": 5.0}):
        assert changed("none", rope_scaling=scaling) > 1e-3, scaling


def test_dynamic_scaling_depends_on_the_length_and_cannot_decode_beyond_the_original(rng):
    config = small_baseline("llama", **DYNAMIC)
    plain = small_baseline("llama")
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (1, 24))
    for length in (16, 17, 24):
        scaled, other = (models.forward(c, params, tokens[:, :length]) for c in (config, plain))
        assert (np.abs(scaled - other).max() > 1e-4) == (length > 16)
    message = r"must be at most model.rope_scaling.original_context \(16\) .* got 17"
    with pytest.raises(ValueError, match=message):
        models.prefill(config, params, tokens[:, :9], length=17)
    with pytest.raises(ValueError, match=message):
        models.init_cache(config, params, 1, 17)
    assert (config.max_length, plain.max_length) == (16, None)


def test_biases_are_sharded_like_the_outputs_and_have_no_weight_decay():
    config = small_baseline("llama", **ALL)
    params = models.abstract_params(config)
    layer = decay_mask(params)["blocks"][0]
    assert not layer["mixer"]["q_proj"]["bias"]
    assert not layer["mixer"]["q_norm"]["scale"]
    assert not layer["mlp"]["down_proj"]["bias"]
    assert layer["mixer"]["q_proj"]["kernel"]
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 4)
    for name, axes in {"q": ("tensor",), "gate": ("tensor",), "o": (), "down": ()}.items():
        found = parameter_spec(f"blocks/0/mixer/{name}_proj/bias", (16,), mesh)
        assert tuple(found) == axes


def test_on_eight_devices(rng):
    """Loss and gradients over a mesh match one device."""
    config = small_baseline("llama", **ALL)
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (4, config.context + 1))
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def value_and_grad(params):
        return jax.value_and_grad(lambda p: loss_sum(config, p, batch))(params)

    expected = jax.jit(value_and_grad)(params)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 4)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, with_shardings(models.abstract_params(config), mesh)
    )
    with jax.set_mesh(mesh):
        found = jax.jit(value_and_grad)(jax.device_put(params, shardings))
    for leaf, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-4 * float(jnp.abs(other).max()) + 1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_bias": "some"}, "model.attention_bias must be one of none, qkv, all; got"),
        ({"rope_scaling": {"type": "longrope"}}, r"rope_scaling.type must be one of none, linear"),
        ({"rope_scaling": {"factor": 2.0}}, r"factor must be its default, 1.0, for .* got 2.0"),
        ({"rope_scaling": {"type": "yarn"}}, r"original_context must be the tokens of .*; got N"),
        ({"rope_scaling": YARN | {"low_freq_factor": 2.0}}, r"low_freq_factor must be its default"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, r"attention_factor must be above 0"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, r"high_freq_factor must be above"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta must be above 1 for yarn"),
        (DYNAMIC | {"head_dim": 2}, r"\(model.head_dim\) must be above 2 for dynamic"),
        (DYNAMIC | {"context": 17}, r"model.context must be at most .*context \(16\) .*; got 17"),
    ],
)
def test_invalid_options_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        small_baseline("llama", **keys)
