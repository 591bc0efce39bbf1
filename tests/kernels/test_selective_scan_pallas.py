"""The TPU kernels, in Pallas' interpret mode on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.selective_scan import pallas_tpu
from tests.kernels.reference import assert_close, cotangents_like
from tests.kernels.test_selective_scan import PER_TOKEN, arguments

NAMES = ["u", "dt", "A", "B", "C", "D", "z", "dt_bias", "segment_ids", "initial_state"]


# XLA's CPU compiler takes twice as long where it fuses what the interpreter makes of the kernels.
jit = partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"})


def run(args):
    return pallas_tpu.selective_scan(*map(args.get, NAMES), interpret=True)


@jit
def run_with_gradients(args, cotangents):
    floats = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    outputs, vjp = jax.vjp(lambda floats: run(args | floats), floats)
    return outputs, vjp(cotangents)[0]


def check(rng, args, output_tolerance, gradient_tolerance):
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    outputs, gradients = run_with_gradients(args, cotangents)
    assert {name: x.dtype for name, x in gradients.items()} == {
        name: args[name].dtype for name in gradients
    }
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close(outputs, expected[0], output_tolerance)
    assert_close(gradients, expected[1], gradient_tolerance)


@pytest.mark.parametrize(
    ("batch", "length", "width", "states", "optional"),
    [
        (2, 1, 5, 3, True),
        (2, 7, 5, 3, False),
        (2, 33, 130, 16, True),
        (1, 150, 500, 3, True),  # two chunks, a tile in two parts
    ],
)
def test_outputs_and_gradients(rng, batch, length, width, states, optional):
    args = arguments(rng, batch, length, width, states, optional=optional)
    check(rng, args, 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "length", "width", "states", "optional"),
    [
        (1, 440, 192, 16, True),
        (3, 584, 192, 16, False),
        (1, 1025, 1536, 16, True),
        (2, 256, 1536, 16, True),
        (2, 300, 256, 32, True),
        (1, 150, 384, 64, True),
        (1, 100, 130, 128, True),
    ],
)
def test_longer_and_wider(rng, batch, length, width, states, optional):
    args = arguments(rng, batch, length, width, states, optional=optional)
    check(rng, args, 1e-5, 1e-4)


def test_bfloat16(rng):
    args = arguments(rng, 2, 33, 130, 16, jnp.bfloat16)
    y, state = jax.eval_shape(run, args)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    check(rng, args, 1e-2, 1e-2)


@pytest.mark.slow
def test_dtypes_may_differ(rng):
    args = arguments(rng, 1, 20, 5, 3)
    args |= {name: args[name].astype(jnp.bfloat16) for name in ("u", "C", "z")}
    check(rng, args, 1e-2, 1e-2)


def test_large_time_steps_forget_everything(rng):
    """exp(delta A) underflows to zero: the state is the last input's, and nothing is NaN."""
    args = arguments(rng, 2, 7, 5, 3, optional=False)
    args |= {"dt": args["dt"] + 1e6, "A": args["A"] - 1}
    (y, state), gradients = run_with_gradients(
        args, cotangents_like(rng, jax.eval_shape(run, args))
    )
    last = (args["dt"] * args["u"])[:, -1, :, None] * args["B"][:, -1, None, :]
    np.testing.assert_allclose(state, last, rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in [y, *gradients.values()])


def test_a_document_is_bitwise_alone(rng):
    """Not even infinite inputs reach the documents after theirs."""
    length, start = 40, 21
    args, others = (arguments(rng, 1, length, 5, 3) for _ in range(2))
    args["segment_ids"] = jnp.asarray(np.arange(length) >= start, jnp.int32)[None]
    perturbed = args | {"initial_state": jnp.full_like(args["initial_state"], jnp.inf)}
    for name in PER_TOKEN:
        perturbed[name] = args[name].at[:, :start].set(others[name][:, :start])

    def after_start(args):
        ones = jnp.ones((1, length, 5)), jnp.ones((1, 5, 3))
        (y, state), gradients = run_with_gradients(args, ones)
        return [state, y[:, start:]] + [gradients[name][:, start:] for name in PER_TOKEN]

    for a, b in zip(after_start(args), after_start(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inside_scan_and_checkpoint(rng):
    """Layers as `jax.lax.scan` over checkpointed blocks have the gradients of a plain loop."""
    args = arguments(rng, 1, 10, 4, 4, optional=False)
    layers = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)

    def block(run, u, D):
        return jnp.tanh(run(**args | {"u": u, "D": D})[0])

    def by_scan(layers):
        step = jax.checkpoint(lambda u, D: (block(lambda **args: run(args), u, D), None))
        return jax.lax.scan(step, args["u"], layers)[0].sum()

    def by_loop(layers):
        u = args["u"]
        for D in layers:
            u = block(formulas.selective_scan, u, D)
        return u.sum()

    scanned, looped = (jit(jax.grad(f))(layers) for f in (by_scan, by_loop))
    np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-5)


def test_sharded_over_batch_and_width(rng):
    args = arguments(rng, 4, 10, 6, 3)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    specs = {name: P("data", None, "model") for name in ("u", "dt", "z")}
    specs |= {name: P("model") for name in ("A", "D", "dt_bias")}
    specs |= {name: P("data") for name in ("B", "C", "segment_ids")}
    specs |= {"initial_state": P("data", "model")}
    outputs = specs["u"], specs["initial_state"]
    # The interpreter cannot check what varies over devices; tests/aot does, with the compiler.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=outputs, check_vma=False)

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    vjp = jax.vjp(lambda floats: sharded(args | floats), floats)[1]
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close(jit(vjp)(cotangents)[0], expected[1], 1e-4)


def test_unsupported():
    args = arguments(np.random.default_rng(0), 2, 7, 5, 3)

    def reason(changed):
        return pallas_tpu.unsupported(*map((args | changed).get, NAMES))

    assert reason({}) is None
    assert reason({"u": jax.ShapeDtypeStruct((2, 7, 5), jnp.bfloat16), "z": None}) is None
    assert "u is float16" in reason({"u": args["u"].astype(jnp.float16)})
    assert "129 states" in reason({"A": jnp.ones((5, 129))})
