"""Equal layers share one trace; results and gradients are those of separate calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flowhn_jax.layers.traced_once import TracedOnce


class Scaled(nnx.Module):
    """x @ kernel * factor, without entry `skipped`; counts how often it is traced."""

    traces = 0

    def __init__(self, key: int, factor: float):
        self.kernel = nnx.Param(jax.random.normal(jax.random.key(key), (4, 4)))
        self.factor = factor

    def __call__(self, x: jax.Array, skipped: jax.Array | None) -> jax.Array:
        Scaled.traces += 1
        x = x @ self.kernel[...] * self.factor
        return x if skipped is None else jnp.where(skipped, 0, x)


def _layers() -> list[Scaled]:
    return [Scaled(key, factor) for key, factor in enumerate((1.0, 0.5, 1.0, 1.0))]


def _gradients(call, skipped, *, checkpoint=False):
    graph, params = nnx.split(nnx.List(_layers()))

    def loss(params, x):
        layers = nnx.merge(graph, params)
        for layer in layers:
            run = partial(call, layer)
            x = jnp.tanh((jax.checkpoint(run) if checkpoint else run)(x, skipped))
        return x.sum()

    x = jax.random.normal(jax.random.key(9), (3, 4))
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


def test_results_are_those_of_separate_calls():
    skipped = jnp.arange(4) == 2
    for mask in (None, skipped):
        expected = _gradients(lambda layer, *x: layer(*x), mask)
        for checkpoint in (False, True):
            found = _gradients(TracedOnce(), mask, checkpoint=checkpoint)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, expected
            )


def test_layers_of_equal_structure_are_traced_once():
    Scaled.traces = 0
    traced = TracedOnce()
    layers = _layers()

    def run(x):
        for layer in layers:
            x = traced(layer, x, None)
        return x

    program = jax.jit(run).lower(jnp.ones((3, 4))).as_text()
    assert Scaled.traces == 2  # the second layer has another factor
    assert program.count("stablehlo.dot_general") == 2
