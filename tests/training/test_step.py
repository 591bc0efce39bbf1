import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.aot.step_memory import shard_bytes
from flowhn_jax.checkpoints.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from flowhn_jax.checkpoints.state import abstract_state, init_state, state_shardings
from flowhn_jax.config import MeshConfig, TrainConfig
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.training.step import make_train_step
from tests.small import small_config


def padded_batch(config, seed=0):
    """Random windows whose rows hold different amounts of padding."""
    rng = np.random.default_rng(seed)
    rows, length = config.train.batch_size, config.model.context + 1
    tokens = rng.integers(0, 257, (rows, length), np.int32)
    ends = rng.integers(2, length + 1, rows)
    segment_ids = (np.arange(length) < ends[:, None]).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids}


def run_steps(config, devices, steps=3):
    mesh = make_mesh(MeshConfig(data=devices), config.train.batch_size // config.train.accumulate)
    step = make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        losses = []
        for seed in range(steps):
            state, metrics = step(state, shard_batch(padded_batch(config, seed), mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    config = small_config("fac_split")
    return run_steps(config, 1)


def assert_same_run(run, expected):
    np.testing.assert_allclose(run[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), run[1], expected[1])


def test_eight_devices_train_as_one(one_device):
    assert_same_run(run_steps(small_config("fac_split"), 8), one_device)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_accumulation_equals_one_large_batch(one_device, devices):
    config = small_config("fac_split", train={"accumulate": 4})
    assert_same_run(run_steps(config, devices), one_device)


def test_loss_is_the_mean_over_targets_that_are_not_padding():
    config = small_config("fac_split")
    batch = padded_batch(config)
    mesh = make_mesh(MeshConfig(data=1), 8)
    state = init_state(config, mesh)
    logits = models.forward(
        config.model, state.params, batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    )
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    target = np.take_along_axis(logits, batch["tokens"][:, 1:, None], axis=2)[..., 0]
    counted = batch["segment_ids"][:, 1:] != 0
    expected = (log_z - target)[counted].mean()
    _, metrics = make_train_step(config, mesh)(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_gradient_norm_is_clipped_before_adam():
    """With beta1 = beta2 = 0 and huge epsilon, AdamW's update is the clipped gradient itself."""
    train = {"beta1": 0.0, "beta2": 0.0, "epsilon": 1e6, "weight_decay": 0.0, "clip_norm": 0.5}
    config = small_config("fac_split", train={**train, "learning_rate": 1e6, "warmup": 0.0})
    mesh = make_mesh(MeshConfig(data=1), 8)
    state = init_state(config, mesh)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(config, mesh)(state, padded_batch(config))
    moved = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), before, jax.device_get(state.params))
    assert float(metrics["grad_norm"]) > 0.5
    assert np.sqrt(sum(jax.tree.leaves(moved))) == pytest.approx(0.5, rel=1e-2)


def test_only_matrices_decay():
    params = models.abstract_params(small_config("no_split").model)
    decayed = set()
    kept = set()
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        (decayed if is_decayed else kept).add(path[-1].key)
    assert decayed == {"kernel", "embedding"}
    assert kept == {"scale", "a_log", "d", "dt_bias", "conv_weight", "conv_bias"}


def test_schedule_warms_up_and_falls_as_a_cosine():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.1)
    rates = np.array([float(learning_rate_schedule(config)(step)) for step in range(101)])
    np.testing.assert_allclose(rates[:11], 0.1 + 0.9 * np.arange(11) / 10, atol=1e-6)
    cosine = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(rates[10:], cosine, atol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    config = TrainConfig(steps=10, learning_rate=0.5, warmup=0.0)
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_of_gradients_is_updated_in_float32_and_stored_rounded(rng, dtype):
    """Compared with AdamW in float64 that rounds the mean after each step."""
    config = TrainConfig(moment_dtype=dtype, clip_norm=0.0, weight_decay=0.0, warmup=0.0)
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    params = {"kernel": jnp.zeros((40, 50))}
    state = optimizer.init(params)
    mean, square = np.zeros((2, 40, 50))
    for step in range(1, 30):
        gradient = rng.standard_normal((40, 50)) + 1
        updates, state = optimizer.update({"kernel": jnp.float32(gradient)}, state, params)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        expected = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.95**step)) + 1e-8)
        expected *= -float(schedule(step - 1))
        np.testing.assert_allclose(updates["kernel"], expected, rtol=2e-4, atol=1e-9)
        stored = state[1][0].mu["kernel"]
        assert stored.dtype == dtype
        np.testing.assert_allclose(stored, mean, rtol=2**-8, atol=1e-6)
        mean = np.asarray(stored, np.float64)


def test_the_mean_of_gradients_in_bfloat16_takes_a_quarter_of_the_optimizer_less():
    """On each of four devices that the state is sharded over."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), 8)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        config = small_config(train={"moment_dtype": dtype})
        state = abstract_state(config, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
        assert shardings == state_shardings(small_config(), mesh).opt_state
        sizes[dtype] = shard_bytes(state.opt_state)
    assert sizes["bfloat16"] == pytest.approx(0.75 * sizes["float32"], abs=8)


@pytest.mark.slow
def test_bfloat16_keeps_float32_masters():
    config = small_config("fac_split", model={"dtype": "bfloat16"})
    mesh = make_mesh(MeshConfig(data=1), 8)
    state = init_state(config, mesh)
    state, metrics = make_train_step(config, mesh)(state, padded_batch(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    exact = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    fresh = init_state(exact, mesh)
    _, reference = make_train_step(exact, mesh)(fresh, padded_batch(config))
    assert float(metrics["loss"]) == pytest.approx(float(reference["loss"]), rel=2e-2)
