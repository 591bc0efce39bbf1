import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.mamba2 import GatedRMSNorm, Mamba2, Mamba2Sizes


def small_mixer(groups=2, dtype=jnp.float32, **sizes):
    sizes = dict(width=8, inner=24, state=4, conv=4, head_dim=4) | sizes
    context = LayerContext(nnx.Rngs(0), dtype, init_std=0.2, norm_eps=1e-5)
    return Mamba2(Mamba2Sizes(**sizes, groups=groups), context)


@nnx.jit
def apply(model, *arguments):
    return model(*arguments)


def test_each_group_is_normed_separately():
    rng = np.random.default_rng()
    x, gate = (rng.standard_normal((2, 5, 12)).astype(np.float32) for _ in range(2))
    norm = GatedRMSNorm(12, 3, epsilon=1e-5)
    norm.scale[...] = jnp.asarray(rng.standard_normal(12), jnp.float32)
    gated = x * (gate / (1 + np.exp(-gate.astype(np.float64))))
    by_group = gated.reshape(2, 5, 3, 4)
    expected = by_group / np.sqrt((by_group**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected.reshape(2, 5, 12) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(x, gate), expected, rtol=1e-5, atol=1e-6)


def test_packed_documents_do_not_affect_each_other():
    model = small_mixer()
    x = jnp.asarray(np.random.default_rng().standard_normal((2, 10, 8)), jnp.float32)
    packed = apply(model, x.reshape(1, 20, 8), jnp.asarray([[3] * 10 + [5] * 10]))
    np.testing.assert_allclose(packed.reshape(x.shape), apply(model, x), rtol=1e-4, atol=1e-6)


def test_initial_values():
    model = small_mixer(inner=256)
    steps = jax.nn.softplus(model.dt_bias[...])
    assert 0.99e-3 < steps.min() < steps.max() < 1.01e-1
    rates = jnp.exp(model.a_log[...])
    assert 0.99 < rates.min() < 4 < 12 < rates.max() < 16.01
    np.testing.assert_array_equal(model.d[...], 1)
    assert jnp.abs(model.conv_weight[...]).max() <= 0.5


def test_bfloat16():
    x = jnp.asarray(np.random.default_rng().standard_normal((2, 20, 8)), jnp.float32)
    model = small_mixer(dtype=jnp.bfloat16)
    y = apply(model, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    expected = apply(small_mixer(), x)
    assert jnp.abs(y - expected).max() < 0.05 * jnp.abs(expected).max()


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="24 channels must be whole heads of 5 in 2 equal groups"):
        small_mixer(head_dim=5)
