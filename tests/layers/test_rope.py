import jax.numpy as jnp
import numpy as np

from flowhn_jax.layers.rope import rotate


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
