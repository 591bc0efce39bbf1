"""Learning rates, and Muon next to AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.aot.step_memory import shard_bytes
from flowhn_jax.checkpoints.optimizer import learning_rate_schedule, make_optimizer
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import BASELINES, MeshConfig, TrainConfig
from flowhn_jax.parallel.mesh import make_mesh
from tests.parallel.test_training import RATE, STEPS, assert_same, train
from tests.small import small_baseline, small_config

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def rates(schedule, **train):
    config = TrainConfig(steps=100, learning_rate=2.0, warmup=0.1, schedule=schedule, **train)
    return np.array([float(learning_rate_schedule(config)(step)) for step in range(121)])


def test_every_schedule_begins_with_the_same_warm_up():
    for schedule in config_lib.SCHEDULES:
        np.testing.assert_allclose(rates(schedule)[:11], 0.2 + 0.18 * np.arange(11), atol=1e-6)


def test_linear_falls_to_the_final_rate_at_the_last_step_and_stays():
    found = rates("linear", final_learning_rate=0.25)
    np.testing.assert_allclose(found[10:101], np.linspace(2.0, 0.5, 91), atol=1e-6)
    np.testing.assert_allclose(found[100:], 0.5)


def test_wsd_is_constant_and_falls_in_the_cooldown():
    found = rates("wsd", final_learning_rate=0.0, cooldown=0.3)
    np.testing.assert_array_equal(found[10:71], 2.0)
    np.testing.assert_allclose(found[70:101], np.linspace(2.0, 0.0, 31), atol=1e-6)


def test_constant_stays_at_the_peak():
    np.testing.assert_array_equal(rates("constant")[10:], 2.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule", "step", "train.schedule must be one of cosine, linear, wsd, constant"),
        ("optimizer", "sgd", "train.optimizer must be one of adamw, muon; got 'sgd'"),
        ("cooldown", 1.5, "train.cooldown must be 0 to 1; got 1.5"),
    ],
)
def test_a_value_that_is_not_one_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{key: value})


def test_a_cooldown_begins_after_the_warm_up():
    TrainConfig(schedule="wsd", warmup=0.5, cooldown=0.5)
    with pytest.raises(
        ValueError, match=r"train.cooldown must be at most 1 - train.warmup \(0.5\)"
    ):
        TrainConfig(schedule="wsd", warmup=0.5, cooldown=0.6)


def orthogonalized(matrix):
    """Return five Newton-Schulz iterations of a matrix divided by its norm, in float64."""
    a, b, c = NEWTON_SCHULZ
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_is_that_of_float64(rng, dtype):
    """Each matrix of a kernel [D, 2, E] is orthogonalized by itself."""
    config = TrainConfig(optimizer="muon", moment_dtype=dtype, clip_norm=0.0, weight_decay=0.3)
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    shapes = {"down_proj": (12, 5), "in_proj": (6, 2, 9)}
    values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    params = {"mlp": {name: {"kernel": jnp.float32(value)} for name, value in values.items()}}
    state = optimizer.init(params)
    means = {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in range(1, 5):
        gradients = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        grads = {"mlp": {name: {"kernel": jnp.float32(g)} for name, g in gradients.items()}}
        updates, state = optimizer.update(grads, state, params)
        stored = {
            path[-2].key: leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if path[-1] == jax.tree_util.DictKey("kernel")
        }
        for name, gradient in gradients.items():
            mean = 0.95 * means[name] + 0.05 * gradient
            # Nesterov: the mean one step ahead, with its bias corrected.
            ahead = 0.95 * mean / (1 - 0.95 ** (step + 1)) + 0.05 * gradient / (1 - 0.95**step)
            matrices = ahead if ahead.ndim == 3 else ahead[:, None]
            parts = [orthogonalized(matrices[:, i]) for i in range(matrices.shape[1])]
            size = 0.2 * np.sqrt(max(matrices.shape[0], matrices.shape[2]))
            update = size * np.stack(parts, 1).reshape(ahead.shape) + 0.3 * values[name]
            expected = -float(schedule(step - 1)) * update
            np.testing.assert_allclose(updates["mlp"][name]["kernel"], expected, atol=2e-8)
            assert stored[name].dtype == dtype
            np.testing.assert_allclose(stored[name], mean, rtol=2**-8, atol=1e-6)
            means[name] = np.asarray(stored[name], np.float64)


def test_outside_of_hidden_matrices_muon_is_adamw(rng):
    model = small_config("no_split", model={"blocks": 1}).model
    params = models.init(model, jax.random.key(0))
    gradients = jax.tree.map(lambda p: jnp.float32(rng.standard_normal(p.shape)), params)
    found = {}
    for name in config_lib.OPTIMIZERS:
        optimizer = make_optimizer(TrainConfig(optimizer=name, warmup=0.0))
        updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
        found[name] = dict(jax.tree_util.tree_leaves_with_path(updates))
    same = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, update in found["adamw"].items()
        if np.array_equal(update, found["muon"][path])
    }
    assert {"embed/embedding", "head/kernel", "final_norm/scale"} < same
    assert all(("kernel" in name) == (name == "head/kernel") for name in same)


@pytest.mark.parametrize("kind", ["flowhn", *BASELINES])
def test_every_kernel_is_a_matrix_or_one_per_index_between_inputs_and_outputs(kind):
    """Muon takes the first dimension for the inputs and the last one for the outputs."""
    model = small_config("no_split").model if kind == "flowhn" else small_baseline(kind)
    for path, leaf in jax.tree_util.tree_leaves_with_path(models.abstract_params(model)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if models.is_hidden_matrix(path) and leaf.ndim != 2:
            assert name.endswith("in_proj/kernel")
            assert leaf.shape == (model.width, 2, 2 * model.width)


def test_the_optimizer_of_a_matrix_takes_half_of_adamws_memory():
    """On each of eight devices that the state is sharded over."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), 8)
    sizes = {}
    for name in config_lib.OPTIMIZERS:
        state = abstract_state(small_config(train={"optimizer": name}), mesh)
        sizes[name] = shard_bytes(state.opt_state)
    of_matrices = shard_bytes(
        [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
            if models.is_hidden_matrix(path)
        ]
    )
    assert sizes["muon"] == pytest.approx(sizes["adamw"] - of_matrices, abs=64)


@pytest.mark.slow
def test_muon_on_eight_devices_is_muon_on_one():
    train_keys = {"steps": STEPS, "learning_rate": RATE, "optimizer": "muon"}
    config = small_config("no_split", model={"blocks": 1, "vocab_size": 64}, train=train_keys)
    assert_same(train(config, data=2, fsdp=2, tensor=2), train(config))
