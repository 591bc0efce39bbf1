"""Linear layers: the parts of a result, on every platform, against products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax.layers import linear as module
from flowhn_jax.layers.context import LayerContext
from flowhn_jax.layers.linear import linear, linear_part, linear_parts

WIDTH, PARTS, FEATURES = 6, 2, 5


def layer_of(rng, *, bias):
    context = LayerContext(nnx.Rngs(0), jnp.dtype("float32"), init_std=1.0, norm_eps=1e-6)
    layer = linear(WIDTH, (PARTS, FEATURES), context, bias=bias)
    if bias:
        layer.bias[...] = rng.normal(size=layer.bias.shape).astype(np.float32)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_parts_and_their_gradients_are_those_of_the_definition(platform, bias, rng, monkeypatch):
    monkeypatch.setattr(module, "target_platform", lambda: platform)
    layer = layer_of(rng, bias=bias)
    x, *dy = (rng.normal(size=(3, 4, n)).astype(np.float32) for n in (WIDTH, FEATURES, FEATURES))
    parts, gradients = jax.vjp(lambda layer, x: linear_parts(layer, x), layer, x)
    d_layer, dx = gradients(tuple(dy))

    kernel = np.asarray(layer.kernel[...], np.float64)
    added = np.asarray(layer.bias[...]) if bias else np.zeros((PARTS, FEATURES))
    cotangents = np.stack(dy, axis=2).astype(np.float64)
    for index, part in enumerate(parts):
        expected = x @ kernel[:, index] + added[index]
        np.testing.assert_allclose(part, expected, atol=1e-5)
        np.testing.assert_allclose(linear_part(layer, x, index), expected, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("btnf,dnf->btd", cotangents, kernel), atol=1e-5)
    expected = np.einsum("btd,btnf->dnf", x, cotangents)
    np.testing.assert_allclose(d_layer.kernel[...], expected, atol=1e-5)
    if bias:
        np.testing.assert_allclose(d_layer.bias[...], cotangents.sum((0, 1)), atol=1e-5)
