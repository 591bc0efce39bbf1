"""Gradients of parameters in bfloat16 models are sums in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax import models
from flowhn_jax.config import BASELINES, MeshConfig, Multipliers
from flowhn_jax.models.loss import loss_sum
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.parallel.rules import with_shardings
from tests.jaxprs import equations
from tests.small import small_baseline, small_config

KINDS = ("flowhn", "flowhn_mamba2", *BASELINES)


def bfloat16_model(kind, **model):
    model |= {"dtype": "bfloat16", "vocab_size": 61}
    if kind in BASELINES:
        return small_baseline(kind, **model)
    if kind == "flowhn_mamba2":
        model |= {"ssm": "mamba2", "ssm_head_dim": 8}
    return small_config("fai_split", model=model).model


def with_one_frequent_token(rng, config, batch):
    """Return tokens [batch, context], nine of ten of which are token 7."""
    tokens = rng.integers(0, config.vocab_size, (batch, config.context))
    return np.where(rng.random(tokens.shape) < 0.9, 7, tokens).astype(np.int32)


def embedding_gradient(config, params, tokens, cotangents):
    """Return the gradient of the table for cotangents of the embedded tokens."""

    def embed(table):
        model = models.bind(config, params | {"embed": {"embedding": table}})
        return model.embed_tokens(tokens)

    return jax.vjp(embed, params["embed"]["embedding"])[1](cotangents)[0]


@pytest.mark.parametrize("axes", [None, {"data": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_gradient_matches_float64(kind, axes, rng):
    """Within 1e-6 for a token that occurs about 900 times; on one device and on a mesh."""
    config = bfloat16_model(kind)
    params = models.init(config, jax.random.key(0))
    tokens = with_one_frequent_token(rng, config, batch=42)
    shape = *tokens.shape, config.width
    cotangents = jnp.asarray(rng.random(shape), jnp.bfloat16)
    run = jax.jit(embedding_gradient, static_argnums=0)
    if axes is None:
        found = run(config, params, tokens, cotangents)
    else:
        mesh = make_mesh(MeshConfig(**({"data": 1} | axes)), 42)
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, with_shardings(models.abstract_params(config), mesh)
        )
        with jax.set_mesh(mesh):
            found = run(config, jax.device_put(params, shardings), tokens, cotangents)
    expected = np.zeros((config.vocab_size, config.width))
    np.add.at(expected, tokens, np.asarray(cotangents, np.float64))
    expected *= getattr(config, "multipliers", Multipliers()).embedding
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_a_sum_in_bfloat16(kind):
    """Norm weights, biases, D, meta tokens, convolutions: each is float32 before it is reduced."""
    config = bfloat16_model(kind)
    tokens = np.zeros((2, config.context + 1), np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
    gradient = jax.grad(lambda params: loss_sum(config, params, batch))
    jaxpr = jax.make_jaxpr(gradient)(models.abstract_params(config)).jaxpr
    sums = ("reduce_sum", "scatter-add", "cumsum", "reduce_window_sum")
    summed = {
        (equation.primitive.name, str(equation.outvars[0].aval))
        for equation in equations(jaxpr)
        if equation.primitive.name in sums and equation.outvars[0].aval.dtype == jnp.bfloat16
    }
    assert not summed
