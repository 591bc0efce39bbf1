"""Options of state-space mixers that published models have and ours by default have not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from flowhn_jax import flops, models
from flowhn_jax.checkpoints.optimizer import make_optimizer
from flowhn_jax.config import MeshConfig, TrainConfig
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.mamba2 import GatedRMSNorm, Mamba2, Mamba2Sizes
from flowhn_jax.models.mamba import Mamba1Config
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import with_shardings
from tests.slow import all_but
from tests.small import small_baseline

BIASES = {"ssm_in_bias": True, "ssm_out_bias": True, "ssm_conv_bias": False}
VARIANTS = {
    "falcon_h1": small_baseline(
        "falcon_h1",
        **BIASES,
        width=20,
        head_dim=6,
        ssm_expand=2.4,
        ssm_groups=3,
        ssm_gated_norm="before_gate",
        ssm_dt_min=0.2,
        ssm_dt_max=0.9,
    ),
    "falcon_mamba": small_baseline("mamba1", **BIASES, ssm_norm_eps=1e-3),
    "mamba2": small_baseline("mamba2", **BIASES, ssm_dt_max=0.7),
    "jamba": small_baseline("jamba", **BIASES),
}


def random_params(config, rng):
    """Return parameters that are all random, biases and norms included."""
    params = models.init(config, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), params
    )


@pytest.mark.parametrize("name", all_but(["falcon_h1", "falcon_mamba"], VARIANTS))
def test_decoding_and_packing_give_the_logits_of_one_pass(name, rng):
    config = VARIANTS[name]
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    expected = models.forward(config, params, tokens)
    lengths = jnp.array([8, 5])
    logits, cache = models.prefill(config, params, tokens[:, :8], lengths, length=12)
    np.testing.assert_allclose(logits, expected[np.arange(2), lengths - 1], atol=2e-5)
    for step in range(4):
        following = tokens[np.arange(2), lengths + step]
        logits, cache = models.step(config, params, following, cache)
        np.testing.assert_allclose(logits, expected[np.arange(2), lengths + step], atol=2e-5)

    packed = np.concatenate([tokens[0, :7], tokens[1, :5]])[None]
    documents = np.array([[0] * 7 + [1] * 5])
    logits = models.forward(config, params, jnp.asarray(packed), jnp.asarray(documents))[0]
    np.testing.assert_allclose(logits[:7], expected[0, :7], atol=2e-5)
    np.testing.assert_allclose(logits[7:], expected[1, :5], atol=2e-5)


@pytest.mark.parametrize("name", all_but(["falcon_h1", "falcon_mamba"], VARIANTS))
def test_biases_are_sharded_and_not_decayed(name):
    config = VARIANTS[name]
    abstract = models.abstract_params(config)
    with_shardings(abstract, make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 4))  # a rule for each
    usual = dataclasses.replace(config, ssm_in_bias=False, ssm_out_bias=False, ssm_conv_bias=True)
    ends = {path[-2:] for path in flatten_dict(abstract)}
    assert {("in_proj", "bias"), ("out_proj", "bias")} <= ends
    assert "conv_bias" not in {last for _, last in ends}
    assert flops.forward_flops(config, 16) == flops.forward_flops(usual, 16)

    optimizer = make_optimizer(TrainConfig(weight_decay=0.5, learning_rate=0.1, warmup=0.0))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(update.any()) == (path[-1].key in ("kernel", "embedding")), path


def test_a_mesh_computes_the_same(rng):
    config = dataclasses.replace(VARIANTS["falcon_h1"], vocab_size=64)
    params = random_params(config, rng)
    tokens = rng.integers(0, config.vocab_size, (2, 12))
    expected = models.forward(config, params, tokens)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), 4, jax.devices()[:4])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, with_shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = models.forward(config, jax.device_put(params, shardings), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gated_norm_against_its_formula(rng):
    x, gate, scale = (rng.standard_normal(shape) for shape in ((3, 12), (3, 12), 12))
    silu = gate / (1 + np.exp(-gate))

    def normed(x):
        groups = x.reshape(3, 4, 3)
        return (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-2)).reshape(3, 12) * scale

    for before_gate, expected in ((False, normed(x * silu)), (True, normed(x) * silu)):
        norm = GatedRMSNorm(12, 4, epsilon=1e-2, before_gate=before_gate)
        norm.scale[...] = jnp.asarray(scale, jnp.float32)
        found = norm(jnp.asarray(x, jnp.float32), jnp.asarray(gate, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_time_steps_stay_within_their_limits(rng):
    """The scan's time steps are those of the softplus, clipped, also in bfloat16."""
    limits = 0.3, 0.8
    sizes = Mamba2Sizes(width=8, inner=16, state=4, conv=2, head_dim=4, groups=1)
    for dtype in (jnp.float32, jnp.bfloat16):
        context = LayerContext(nnx.Rngs(0), dtype, 0.2, 1e-5)
        layer = Mamba2(sizes, context, dt_limits=limits)
        layer.dt_bias[...] = jnp.asarray(rng.standard_normal(4), jnp.float32)
        dt = jnp.asarray(rng.standard_normal((2, 6, 4)) * 2, dtype)
        inputs = layer._ssd_arguments(jnp.zeros((2, 6, 24), dtype), dt)
        assert inputs.dt_bias is None
        steps = np.log1p(np.exp(np.asarray(dt, np.float64) + np.asarray(layer.dt_bias[...])))
        found = jax.nn.softplus(inputs.dt)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, np.clip(steps, *limits), rtol=1e-5)
        assert steps.min() < limits[0]
        assert steps.max() > limits[1]
        x = jnp.asarray(rng.standard_normal((2, 6, 8)), dtype)
        assert np.isfinite(np.asarray(layer(x), np.float32)).all()


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("falcon_h1", {"ssm_gated_norm": "yes"}, "ssm_gated_norm must be one of none, before_gate"),
        ("mamba1", {"ssm_norm_eps": 0.0}, "model.ssm_norm_eps must be above 0, or None; got 0.0"),
        ("mamba2", {"ssm_dt_min": -0.1}, "model.ssm_dt_min must be 0 or more; got -0.1"),
        (
            "mamba2",
            {"ssm_dt_min": 0.2, "ssm_dt_max": 0.1},
            r"model.ssm_dt_max must be above model.ssm_dt_min \(0.2\), or None; got 0.1",
        ),
        ("shm", {"ssm_in_bias": True}, "model.ssm_in_bias must be its default, False, for"),
    ],
)
def test_bad_values_are_refused(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        small_baseline(kind, **keys)


@pytest.mark.parametrize(("width", "inner"), [(49, 50), (2560, 4096), (1280, 1536), (41, 123)])
def test_every_quotient_of_integers_is_an_expansion(width, inner):
    assert Mamba1Config(width=width, ssm_expand=inner / width).inner == inner
