"""Properties of all baselines; parity with transformers is in tests/interop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax import models
from flowhn_jax.config import BASELINES, MeshConfig
from flowhn_jax.models import hymba
from flowhn_jax.models.loss import loss_sum
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import with_shardings
from tests.slow import all_but
from tests.small import small_baseline


def params_of(config):
    return models.init(config, jax.random.key(np.random.default_rng().integers(2**31)))


def tokens_of(config, length=None, batch=2):
    shape = batch, config.context if length is None else length
    return np.random.default_rng().integers(0, config.vocab_size, shape)


some_kinds = pytest.mark.parametrize("kind", all_but(["llama", "mamba2", "jamba"], BASELINES))


@pytest.mark.parametrize("kind", BASELINES)
def test_no_token_influences_an_earlier_one(kind):
    config = small_baseline(kind)
    params, tokens = params_of(config), tokens_of(config)
    changed = tokens.copy()
    changed[:, 11] = (changed[:, 11] + 1) % config.vocab_size
    before, after = (np.asarray(models.forward(config, params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert np.abs(before[:, 11:] - after[:, 11:]).max(axis=(0, 2)).min() > 0


@some_kinds
def test_documents_never_attend_to_each_other(kind):
    """Another first document leaves the second one's logits unchanged, bit for bit."""
    config = small_baseline(kind)
    params, tokens = params_of(config), tokens_of(config)
    segment_ids = np.repeat([[1, 2]], [9, 15], axis=1).repeat(2, axis=0)
    changed = tokens.copy()
    changed[:, :9] = tokens_of(config, 9)
    before, after = (
        np.asarray(models.forward(config, params, t, segment_ids)) for t in (tokens, changed)
    )
    np.testing.assert_array_equal(before[:, 9:], after[:, 9:])
    # Each has the logits that it has alone.
    alone = models.forward(config, params, tokens[:, :9])
    np.testing.assert_allclose(before[:, :9], alone, atol=1e-5, rtol=1e-5)
    alone = models.forward(config, params, tokens[:, 9:])
    np.testing.assert_allclose(before[:, 9:], alone, atol=5e-5, rtol=1e-5)


@some_kinds
def test_gradients(kind):
    """Every parameter has a finite gradient that is not zero, the same with remat."""
    config = small_baseline(kind)
    params, tokens = params_of(config), tokens_of(config, config.context + 1)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}

    def gradients(remat):
        return jax.jit(jax.grad(lambda p: loss_sum(config, p, batch, remat=remat)))(params)

    plain = gradients("none")
    for leaf in jax.tree.leaves(plain):
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() > 0
    for leaf, again in zip(*map(jax.tree.leaves, (plain, gradients("full"))), strict=True):
        np.testing.assert_allclose(leaf, again, atol=1e-4 * float(jnp.abs(leaf).max()))


@some_kinds
def test_bfloat16(kind):
    config, half = (small_baseline(kind, dtype=dtype) for dtype in ("float32", "bfloat16"))
    params, tokens = params_of(config), tokens_of(config)
    expected, logits = (models.forward(c, params, tokens) for c in (config, half))
    assert logits.dtype == jnp.float32
    assert jnp.abs(logits - expected).max() < 0.15 * jnp.abs(expected).max()
    cache = models.init_cache(half, params, *tokens.shape)
    stepped, _ = models.step(half, params, tokens[:, 0], cache)
    assert jnp.abs(stepped - logits[:, 0]).max() < 0.1 * jnp.abs(expected).max()


SHARDED, SPLIT_POSITIONS = {"fsdp": 4, "tensor": 2}, {"sequence": 2, "data": 2}
ON_EIGHT = ("llama", SHARDED), ("falcon_h1", SHARDED), ("mamba2", SPLIT_POSITIONS)


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        case if case in ON_EIGHT else pytest.param(*case, marks=pytest.mark.slow)
        for axes in (SHARDED, SPLIT_POSITIONS)
        for case in ((kind, axes) for kind in BASELINES)
    ],
)
def test_on_eight_devices(kind, axes):
    """Loss and gradients over a mesh match one device, and parameters are sharded."""
    even = {"meta_tokens": 4} if kind == "hymba" else {}  # positions that divide over `sequence`
    config = small_baseline(kind, **even)
    params, tokens = params_of(config), tokens_of(config, config.context + 1, batch=4)
    batch = {"tokens": tokens, "segment_ids": np.repeat([[1, 2]], [9, 16], axis=1).repeat(4, 0)}

    def value_and_grad(params):
        return jax.value_and_grad(lambda p: loss_sum(config, p, batch))(params)

    expected = jax.jit(value_and_grad)(params)
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes), 4)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, with_shardings(models.abstract_params(config), mesh)
    )
    placed = jax.device_put(params, shardings)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
    with jax.set_mesh(mesh):
        found = jax.jit(value_and_grad)(placed)
    for leaf, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-4 * float(jnp.abs(other).max()) + 1e-6)


@given(layers=st.integers(1, 40))
@settings(max_examples=40)
def test_hymbas_layers(layers):
    """First, middle and last are global; others pair up, and none borrows from a global one."""
    is_global = [hymba.is_global(index, layers) for index in range(layers)]
    borrows = [hymba.borrows(index, layers) for index in range(layers)]
    assert is_global[0]
    assert is_global[layers // 2]
    assert is_global[-1]
    assert sum(is_global) <= 3
    for index in range(layers):
        if borrows[index]:
            assert not is_global[index]
            assert not is_global[index - 1]
            assert not borrows[index - 1]
        elif not is_global[index] and not is_global[index - 1]:
            assert borrows[index - 1]


def test_hymbas_window_ends_and_its_meta_tokens_reach_everywhere():
    """In one windowed layer a token reaches as far as the window, a meta token to the end."""
    config = small_baseline("hymba")
    attention = models.build(config).blocks[1].mixer.attention
    assert (attention.window, attention.prefix) == (5, 3)
    x = jnp.asarray(np.random.default_rng().standard_normal((1, 20, 16)), jnp.float32)
    influence = jax.jacobian(lambda x: attention(x).sum(-1)[0])(x)[:, 0]  # [20, 20, 16]
    reached = np.abs(np.asarray(influence)).max(-1) > 0
    for i in range(20):
        for j in range(20):
            assert reached[i, j] == (j <= i and (j > i - 5 or j < 3)), (i, j)


def test_multipliers_change_falcon_h1():
    config = small_baseline("falcon_h1")
    params, tokens = params_of(config), tokens_of(config)
    expected = models.forward(config, params, tokens)
    for name in ("embedding", "head", "attention_out", "key", "ssm_dt", "mlp_gate"):
        other = small_baseline("falcon_h1", multipliers={name: 1.5})
        assert jnp.abs(models.forward(other, params, tokens) - expected).max() > 1e-4
