"""The Triton kernel of head and cross-entropy, in Triton's interpreter on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels import cross_entropy as operation
from kernels.backends import Backend
from kernels.cross_entropy import triton as backend
from tests.kernels import triton_interpreter
from tests.kernels.reference import assert_close, with_gradients
from tests.kernels.test_cross_entropy import FAR, arguments, both_reductions, far_logits
from tests.kernels.triton_checks import check_refusals, needs_triton


def interpret(launch):
    """Run a launch with bfloat16 widened: the interpreter multiplies the bits of bfloat16.

    The products, which accumulate in float32, are the same.
    """

    def widen(x):
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    outputs = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in launch.outputs.items()
    }
    wide = launch._replace(inputs=tuple(map(widen, launch.inputs)), outputs=outputs)
    found = triton_interpreter.run(wide, module="kernels.cross_entropy.triton_kernels")
    return tuple(x.astype(y.dtype) for x, y in zip(found, launch.outputs.values(), strict=True))


@pytest.fixture
def run(monkeypatch):
    """Return the operation on the interpreted kernel, with gradients."""
    interpreted_backend = Backend(lambda: backend.products(interpret))
    monkeypatch.setitem(operation.OPERATION.backends, "triton", interpreted_backend)

    def run(args, cotangent, reduction, chunk_size=None, z_loss=0.0):
        options = {"reduction": reduction, "chunk_size": chunk_size, "z_loss": z_loss}
        loss = partial(operation.cross_entropy, backend="triton", **options)
        return jax.jit(with_gradients(lambda args: loss(**args)))(args, cotangent)

    return run


def check(args, results, cotangent, reduction, z_loss=0.0, scale=1):
    """Compare results, and gradients where targets exist, with those of float64."""

    def losses(**args):
        weighted = formulas.cross_entropy(**args, z_loss=z_loss)
        return weighted.sum() if reduction == "sum" else weighted

    head = args["head"].astype(jnp.bfloat16)  # as the products see it
    expected = formulas.in_float64(losses, args | {"head": head}, cotangent)
    exists = (args["targets"] >= 0) & (args["targets"] < head.shape[1])
    for each in (results[1], expected[1]):
        each["weights"] = np.where(exists, each["weights"], 0)
    assert_close(results[0], expected[0], 1e-5, scale=1)
    assert_close(results[1], expected[1], 1e-2, scale=scale)


@needs_triton
@both_reductions
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "chunk_size", "z_loss"),
    [
        (1, 3, 5, None, 0.0),
        (40, 70, 300, 13, 0.3),
        (130, 64, 256, None, 1e-4),
        pytest.param(300, 200, 1030, 150, 0.0, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, run, reduction, tokens, width, vocabulary, chunk_size, z_loss):
    args = arguments(rng, tokens, width, vocabulary, jnp.bfloat16)
    args["head"] = args["head"] / np.sqrt(width)
    cotangent = jnp.asarray(rng.standard_normal(tokens if reduction == "none" else ()), jnp.float32)
    results = run(args, cotangent, reduction, chunk_size, z_loss)
    assert all(results[1][name].dtype == args[name].dtype for name in results[1])
    check(args, results, cotangent, reduction, z_loss)


@needs_triton
@both_reductions
@pytest.mark.parametrize("kind", FAR)
def test_logits_far_from_their_mean(rng, run, reduction, kind):
    args = far_logits(rng, kind, tokens=20)
    args["hidden"] = args["hidden"].astype(jnp.bfloat16)
    args["head"] = args["head"].astype(jnp.bfloat16).astype(jnp.float32)
    cotangent = jnp.asarray(rng.standard_normal(20 if reduction == "none" else ()), jnp.float32)
    check(args, run(args, cotangent, reduction), cotangent, reduction, scale=64)


@needs_triton
@both_reductions
def test_a_vocabulary_over_devices(rng, run, reduction):
    args = arguments(rng, 24, 8, 12, jnp.bfloat16)
    cotangent = jnp.asarray(rng.standard_normal(24 if reduction == "none" else ()), jnp.float32)
    mesh = jax.make_mesh((1, 2), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        results = run(args, cotangent, reduction)
    check(args, results, cotangent, reduction)


@needs_triton
def test_a_factor_of_zero_is_not_divided_by(rng, run):
    """Where 2 z_loss lse is -1, the gradient by all logits but the target's is zero."""
    args = arguments(rng, 8, 3, 4, jnp.bfloat16)
    args["head"] = jnp.full_like(args["head"], -1)
    args["hidden"] = jnp.ones_like(args["hidden"])
    z_loss = float(-1 / (2 * (np.log(4) - 3)))
    results = run(args, jnp.float32(1), "sum", z_loss=z_loss)
    check(args, results, jnp.float32(1), "sum", z_loss)


def test_refusals(monkeypatch):
    hidden, head = (jax.ShapeDtypeStruct((4, 4), jnp.bfloat16) for _ in range(2))
    check_refusals(monkeypatch, partial(backend.unsupported, hidden, head))
    single = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert backend.unsupported(single, head) == "hidden is float32, not bfloat16"
    empty = jax.ShapeDtypeStruct((0, 4), jnp.bfloat16)
    assert "hidden (0, 4) is empty" in backend.unsupported(empty, head)
