"""Models whose head is the embedding's table."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.config import BASELINES, MeshConfig
from flowhn_jax.models.loss import loss_sum, token_losses
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import with_shardings
from tests.slow import all_but
from tests.small import small_baseline, small_config


def small(kind, *, tied=True, **model):
    model["tie_embeddings"] = tied
    if kind in BASELINES:
        return small_baseline(kind, **model)
    return small_config(kind, model=model).model


def batch_for(config, rng):
    tokens = rng.integers(0, config.vocab_size, (4, config.context + 1)).astype(np.int32)
    segment_ids = np.repeat([[1, 2]], [9, config.context - 8], axis=1).repeat(4, 0)
    return {"tokens": tokens, "segment_ids": segment_ids}


def untied_copy(params):
    """Return the parameters of the untied model that computes the same."""
    return params | {"head": {"kernel": params["embed"]["embedding"].T}}


def gradients(config, params, batch):
    function = jax.jit(jax.value_and_grad(lambda p: loss_sum(config, p, batch, z_loss=1e-3)))
    return function(params)


FEW = [("fai_split", "float32"), ("llama", "bfloat16")]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in itertools.product(("fai_split", *BASELINES), ("float32", "bfloat16"))
    ],
)
def test_the_gradient_is_the_sum_of_both_uses(kind, dtype, rng):
    """Added in float64; equal up to float32 rounding, also where products are bfloat16."""
    tied, untied = (small(kind, tied=tied, dtype=dtype) for tied in (True, False))
    params = models.init(tied, jax.random.key(0))
    batch = batch_for(tied, rng)
    loss, found = gradients(tied, params, batch)
    expected_loss, parts = gradients(untied, untied_copy(params), batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    head = np.asarray(parts.pop("head")["kernel"], np.float64)
    parts["embed"]["embedding"] = np.asarray(parts["embed"]["embedding"], np.float64) + head.T
    # The terms of a leaf with few elements may nearly cancel; it is compared with a typical leaf.
    typical = np.median([float(np.abs(leaf).max()) for leaf in jax.tree.leaves(parts)])
    for leaf, other in zip(*map(jax.tree.leaves, (found, parts)), strict=True):
        assert leaf.dtype == jnp.float32
        largest = max(float(np.abs(other).max()), typical if leaf.size < 4 else 0.0)
        np.testing.assert_allclose(leaf, other, atol=2e-6 * largest, rtol=0)
    assert np.abs(head).max() > 0.01 * np.abs(parts["embed"]["embedding"]).max()


@pytest.mark.parametrize("kind", ["fai_split", "mamba1"])
def test_the_initial_values_are_those_of_the_untied_model(kind):
    tied, untied = (models.init(small(kind, tied=t), jax.random.key(3)) for t in (True, False))
    assert models.param_count(small(kind)) == sum(leaf.size for leaf in jax.tree.leaves(tied))
    del untied["head"]
    jax.tree.map(np.testing.assert_array_equal, tied, untied)


@pytest.mark.parametrize("kind", all_but(["falcon_h1"], ["fai_split", "falcon_h1"]))
def test_decoding_and_scoring_use_the_table(kind, rng):
    config, untied = small(kind), small(kind, tied=False)
    params = models.init(config, jax.random.key(1))
    batch = batch_for(config, rng)
    tokens = batch["tokens"][:, :12]
    expected = models.forward(untied, untied_copy(params), tokens)
    inference = models.for_inference(config, params)
    scale = float(jnp.abs(expected).max())
    logits, cache = models.prefill(config, inference, tokens[:, :-1], length=12)
    np.testing.assert_allclose(logits, expected[:, -2], atol=1e-5 * scale)
    logits, _ = models.step(config, inference, tokens[:, -1], cache)
    np.testing.assert_allclose(logits, expected[:, -1], atol=1e-5 * scale)
    losses = token_losses(config, params, batch)
    np.testing.assert_allclose(losses.sum(), loss_sum(config, params, batch), rtol=1e-6)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2}]
)
def test_no_device_gathers_the_table_over_tensor(axes, rng):
    """Its parts of the vocabulary stay apart in both uses, forward and backward."""
    config = small("llama", vocab_size=64, width=32)
    mesh = make_mesh(MeshConfig(data=1, **axes), 4)
    abstract = with_shardings(models.abstract_params(config), mesh)
    batch = batch_for(config, rng)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        function = jax.grad(lambda p: loss_sum(config, p, batch))
        compiled = jax.jit(function, out_shardings=shardings).lower(abstract).compile()
    text = str(compiled.as_text())
    assert "f32[32,32]" in text or "f32[32,16]" in text  # half of the vocabulary
    for whole in ("f32[64,32]", "f32[32,64]"):
        assert whole not in text
