import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.layers.rope import RopeScaling, rotate


def test_pairs_are_rotated_by_their_angle(rng):
    """Compared with complex numbers in float64."""
    x = rng.standard_normal((2, 7, 3, 8))
    positions = np.arange(7) + 90
    angles = positions[:, None] * 10000.0 ** (-np.arange(4) / 4)
    rotated = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    expected = np.concatenate((rotated.real, rotated.imag), axis=-1)
    found = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), 10000.0)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_one_token_of_each_sequence(rng):
    x = jnp.asarray(rng.standard_normal((3, 9, 2, 4)), jnp.bfloat16)
    everything = rotate(x, jnp.arange(9), 500.0)
    places = jnp.asarray([8, 0, 3])
    found = rotate(x[jnp.arange(3), places], places, 500.0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, everything[jnp.arange(3), places])


CONTEXT = 256
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "yarn_with_all_keys": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0}
    | {"truncate": False, "attention_factor": 1.7, "original_max_position_embeddings": 128},
    "yarn_of_one_frequency": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 2.0}
    | {"beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, 1000])
def test_scaled_frequencies_are_those_of_transformers(name, length):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = SCALINGS[name]
    config = transformers.LlamaConfig(
        **{"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": CONTEXT},
        rope_parameters=theirs | {"rope_theta": 5e5},
    )
    compute = ROPE_INIT_FUNCTIONS[theirs["rope_type"]]
    expected, factor = compute(config, torch.device("cpu"), seq_len=length)
    names = {"rope_type": "type", "original_max_position_embeddings": "original_context"}
    keys = {names.get(key, key): value for key, value in theirs.items()}
    if name == "dynamic":
        keys["original_context"] = CONTEXT
    scaling = RopeScaling(**keys)
    np.testing.assert_allclose(scaling.frequencies(16, 5e5, length), expected, rtol=1e-6)
    assert scaling.rotation_factor == pytest.approx(factor, rel=1e-12)


def test_yarn_scales_what_it_rotates(rng):
    x = jnp.asarray(rng.standard_normal((2, 5, 1, 6)), jnp.float32)
    scaling = RopeScaling(type="yarn", factor=4.0, original_context=8, attention_factor=1.5)
    rotated = rotate(x, jnp.arange(5), 100.0, scaling)
    norms = (np.linalg.norm(y, axis=-1) for y in (rotated, 1.5 * x))
    np.testing.assert_allclose(*norms, rtol=1e-5)
