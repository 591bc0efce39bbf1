"""A run on a mesh of eight devices is the run on one."""

import functools

import jax
import numpy as np
import pytest

from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.training.step import make_train_step
from tests.small import small_config

STEPS, RATE = 10, 1e-3
# Every combination of data, fsdp, branch and tensor that has more than one device.
MESHES = [
    dict(data=8),
    dict(fsdp=8),
    dict(tensor=2),
    dict(branch=2),
    dict(data=4, fsdp=2),
    dict(data=4, tensor=2),
    dict(data=4, branch=2),
    dict(fsdp=4, tensor=2),
    dict(fsdp=4, branch=2),
    dict(branch=2, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(data=2, fsdp=2, branch=2),
    dict(data=2, branch=2, tensor=2),
    dict(fsdp=2, branch=2, tensor=2),
]
FEW = [dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, branch=2, tensor=2)]
WITH_SEQUENCE = [dict(sequence=4), dict(data=2, sequence=4), dict(fsdp=2, sequence=2, tensor=2)]


def train(config, **axes):
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes), config.train.batch_size)
    rng = np.random.default_rng(0)
    shape = config.train.batch_size, config.model.context + 1
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        step = make_train_step(config, mesh)
        for _ in range(STEPS):
            tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
            segment_ids = np.where(np.arange(shape[1]) < 11, 1, 2) * np.ones(shape, np.int32)
            batch = {"tokens": tokens, "segment_ids": segment_ids}
            state, metrics = step(state, shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def recipe(strategy="fac_split", ssm="mamba1", options=None, tied=False):
    model = {"ssm": ssm, "ssm_head_dim": 8, "blocks": 2, "vocab_size": 64, "tie_embeddings": tied}
    split = {}
    if options:
        model |= {"fusion": "residual", "attention_rope_theta": 100.0, "attention_mlp_width": 40}
        split |= {"stem": 1, "stem_kind": "ssm", "reads": options}
    train = {"steps": STEPS, "learning_rate": RATE}
    return small_config(strategy, model=model, split=split, train=train)


@functools.cache
def on_one_device(**names):
    return train(recipe(**names))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        # What began at zero is as large as Adam's steps, even where the gradient is rounding alone.
        largest = max(np.abs(b).max(), STEPS * RATE)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize(
    "axes",
    [
        mesh if mesh == FEW[1] else pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in MESHES + WITH_SEQUENCE
    ],
)
def test_every_combination_of_axes(axes):
    assert_same(train(recipe(), **axes), on_one_device())


BRANCH, SEQUENCE = dict(fsdp=2, branch=2, tensor=2), dict(fsdp=2, sequence=4)


@pytest.mark.parametrize(
    ("strategy", "axes"),
    [
        ("fai_split", BRANCH),
        ("learned_split", SEQUENCE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("fa_split", SEQUENCE),
                ("no_split", SEQUENCE),
                ("ae_split", SEQUENCE),
                ("fai_split", SEQUENCE),
                ("no_split", BRANCH),
                ("learned_split", BRANCH),
                ("ae_split", BRANCH),
                ("fa_split", BRANCH),
            )
        ),
    ],
)
def test_every_strategy(strategy, axes):
    assert_same(train(recipe(strategy), **axes), on_one_device(strategy=strategy))


@pytest.mark.parametrize(
    "axes", [pytest.param(BRANCH, marks=pytest.mark.slow), SEQUENCE], ids=["branch", "sequence"]
)
def test_mamba2(axes):
    assert_same(train(recipe(ssm="mamba2"), **axes), on_one_device(ssm="mamba2"))


@pytest.mark.parametrize(
    ("reads", "axes"),
    [
        ("own", BRANCH),
        pytest.param("own", SEQUENCE, marks=pytest.mark.slow),
        pytest.param("all", BRANCH, marks=pytest.mark.slow),
        pytest.param("all", SEQUENCE, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_options(reads, axes):
    names = dict(strategy="fai_split", options=reads)
    assert_same(train(recipe(**names), **axes), on_one_device(**names))


@pytest.mark.parametrize(
    "axes", [FEW[0], pytest.param(SEQUENCE, marks=pytest.mark.slow)], ids=["tensor", "sequence"]
)
@pytest.mark.slow
def test_tied_embeddings(axes):
    assert_same(train(recipe(tied=True), **axes), on_one_device(tied=True))
