"""The attention layer against float64, on the backends that run on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flowhn_jax.bench import formulas
from flowhn_jax.layers.attention import Attention, AttentionSizes
from flowhn_jax.layers.context import LayerContext
from kernels import attention as operation
from kernels.attention import splash
from kernels.backends import Backend, Operation
from tests.kernels.reference import assert_close, cotangents_like

AUTO = jax.sharding.AxisType.Auto


@pytest.fixture
def splash_on_cpu(monkeypatch):
    """Attention runs as for a TPU, with the kernel interpreted."""
    interpreted = Backend(partial(splash.attention, interpret=True), ("cpu",), splash.unsupported)
    backends = operation.OPERATION.backends | {"splash": interpreted}
    on_cpu = Operation("attention", backends, {"cpu": ("splash", "xla")})
    monkeypatch.setattr(operation, "OPERATION", on_cpu)
    monkeypatch.setattr(operation, "target_platform", lambda: "tpu")


def layer_and_arguments(rng, shape, sizes, *, documents=True, dtype=jnp.float32, **options):
    """Return a layer's graph, and x, its kernels and the documents by name."""
    context = LayerContext(nnx.Rngs(0), dtype, init_std=0.2, norm_eps=1e-5)
    graph, state = nnx.split(Attention(AttentionSizes(*sizes), context, **options))
    args = {
        path[0]: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
        for path, x in nnx.to_flat_state(state)
    }
    args["x"] = jnp.asarray(rng.standard_normal((*shape, sizes[0])), dtype)
    if documents:
        args["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, shape), axis=1))
    return graph, args


def run_with_gradients(graph, args, cotangent):
    @jax.jit
    def run(args, cotangent):
        def output(floats):
            kernels = {n: {"kernel": nnx.Param(w)} for n, w in floats.items() if n != "x"}
            layer = nnx.merge(graph, nnx.State(kernels))
            return layer(floats["x"], args.get("segment_ids"))

        floats = {name: x for name, x in args.items() if name != "segment_ids"}
        y, vjp = jax.vjp(output, floats)
        return y, vjp(cotangent)[0]

    return run(args, cotangent)


def formula(
    x, q_proj, k_proj, v_proj, o_proj=None, segment_ids=None, *, head_dim, rope_theta=None,
    key_multiplier=1.0, **visibility,
):  # fmt: skip
    """Return the layer's output: heads side by side in the projections' features."""

    def heads(kernel):
        return (x @ kernel).reshape(*x.shape[:2], -1, head_dim)

    def rotate(y):
        if rope_theta is None:
            return y
        half = head_dim // 2
        angles = jnp.arange(x.shape[1])[:, None] * rope_theta ** (-jnp.arange(half) / half)
        pairs = (y[..., :half] + 1j * y[..., half:]) * jnp.exp(1j * angles)[:, None]
        return jnp.concatenate((pairs.real, pairs.imag), axis=-1)

    q, k = rotate(heads(q_proj)), rotate(key_multiplier * heads(k_proj))
    y = formulas.attention(q, k, heads(v_proj), segment_ids, **visibility)
    y = y.reshape(*x.shape[:2], -1)
    return y if o_proj is None else y @ o_proj


def check(rng, shape, sizes, tolerance, *, documents=True, dtype=jnp.float32, **options):
    graph, args = layer_and_arguments(
        rng, shape, sizes, documents=documents, dtype=dtype, **options
    )
    width = sizes[0] if options.get("projects", True) else sizes[1] * sizes[3]
    cotangent = cotangents_like(rng, jax.ShapeDtypeStruct((*shape, width), dtype))
    y, gradients = run_with_gradients(graph, args, cotangent)
    assert y.dtype == gradients["x"].dtype == dtype
    options.pop("projects", None)
    reference = partial(formula, head_dim=sizes[3], **options)
    expected = formulas.in_float64(reference, args, cotangent)
    assert_close(y, expected[0], tolerance)
    assert_close(gradients, expected[1], tolerance)


@pytest.mark.parametrize(
    ("shape", "sizes", "options"),
    [
        ((2, 7), (12, 4, 2, 6), dict(rope_theta=100.0)),
        ((1, 130), (20, 3, 1, 5), dict(window=9)),
        ((2, 65), (12, 4, 4, 3), dict(documents=False, key_multiplier=0.5, projects=False)),
        ((2, 65), (12, 2, 1, 4), dict(documents=False, prefix=3, window=7)),
    ],
)
def test_outputs_and_gradients(rng, shape, sizes, options):
    check(rng, shape, sizes, 1e-4, **options)


def test_bfloat16(rng):
    check(rng, (2, 50), (16, 4, 2, 8), 3e-2, dtype=jnp.bfloat16, rope_theta=100.0)


@pytest.mark.parametrize(
    ("shape", "sizes", "options"),
    [
        ((2, 7), (16, 4, 2, 24), dict(rope_theta=100.0)),
        ((1, 200), (16, 3, 1, 24), dict(window=70, key_multiplier=0.5)),
        ((1, 128), (16, 2, 2, 32), dict(documents=False, projects=False)),
        ((1, 130), (16, 2, 1, 8), dict(documents=False, prefix=3, window=7)),  # runs on XLA
    ],
)
def test_splash(rng, splash_on_cpu, shape, sizes, options):
    check(rng, shape, sizes, 3e-2, dtype=jnp.bfloat16, **options)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "tensor": 2, "sequence": 2}])
def test_splash_on_eight_devices(rng, splash_on_cpu, axes):
    graph, args = layer_and_arguments(rng, (8, 70), (16, 4, 2, 24), dtype=jnp.bfloat16)
    cotangent = cotangents_like(rng, args["x"])
    expected = run_with_gradients(graph, args, cotangent)
    with jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes), (AUTO,) * len(axes))):
        found = run_with_gradients(graph, args, cotangent)
    assert_close(found, jax.tree.map(lambda x: np.asarray(x, np.float64), expected), 2e-2)


def test_tokens_are_padded_only_for_the_kernel(splash_on_cpu):
    assert operation.padded_length(577, jnp.bfloat16) == 640
    assert operation.padded_length(640, jnp.bfloat16) == 640
    assert operation.padded_length(577, jnp.float32) == 577
    assert operation.padded_length(577, jnp.bfloat16, prefix=1) == 577
    for axis, length in (("data", 640), ("tensor", 577), ("sequence", 577)):
        with jax.set_mesh(jax.make_mesh((2,), (axis,), (AUTO,))):
            assert operation.padded_length(577, jnp.bfloat16) == length


def test_no_padding_on_a_cpu():
    assert operation.padded_length(577, jnp.bfloat16) == 577
