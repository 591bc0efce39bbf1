import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.selective_scan import triton as backend
from tests.kernels import triton_interpreter
from tests.kernels.reference import assert_close, cotangents_like
from tests.kernels.test_selective_scan import PER_TOKEN, arguments

interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
OPTIONAL = ["z", "dt_bias", "segment_ids", "initial_state"]
TILE = backend.Tile(tokens=8, channels=32)


@partial(jax.jit, static_argnames="tile")
def run(args, tile):
    args = dict.fromkeys(OPTIONAL) | args
    return backend.scan_with(triton_interpreter.run, tile, **args)


@partial(jax.jit, static_argnames="tile")
def run_with_gradients(args, cotangents, tile):
    floats = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    outputs, vjp = jax.vjp(lambda floats: run(args | floats, tile), floats)
    return outputs, vjp(cotangents)[0]


@interpreted
@pytest.mark.parametrize(
    ("tile", "length", "width", "states", "optional"),
    [
        ((16, 32), 1, 5, 8, True),
        ((8, 32), 7, 33, 2, True),
        ((16, 32), 33, 5, 2, True),
        ((8, 32), 19, 5, 3, False),
        ((8, 16), 9, 17, 3, True),
        ((16, 8), 17, 3, 8, False),
        ((4, 8), 5, 8, 16, True),
        ((2, 4), 3, 2, 64, True),
        pytest.param((16, 32), 33, 5, 3, False, marks=pytest.mark.slow),
        pytest.param((16, 32), 35, 33, 16, True, marks=pytest.mark.slow),
        pytest.param((16, 16), 20, 33, 128, True, marks=pytest.mark.slow),
        pytest.param((16, 32), 440, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32), 584, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32), 1025, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32), 18, 192, 4, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, tile, length, width, states, optional):
    batch = 2 if length < 8 else 1
    args = arguments(rng, batch, length, width, states, optional=optional)
    tile = backend.Tile(*tile)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, tile=tile))
    outputs, gradients = run_with_gradients(args, cotangents, tile)
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close(outputs, expected[0], 1e-5)
    assert_close(gradients, expected[1], 1e-4)


@interpreted
@pytest.mark.parametrize("exceptions", [[], ["dt", "C"]])
def test_bfloat16(rng, exceptions):
    args = arguments(rng, 1, 19, 5, 3, jnp.bfloat16)
    args |= {name: args[name].astype(jnp.float32) for name in exceptions}
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, tile=TILE))
    (y, state), gradients = run_with_gradients(args, cotangents, TILE)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(gradients[name].dtype == args[name].dtype for name in gradients)
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close((y, state), expected[0], 1e-2)
    assert_close(gradients, expected[1], 1e-2)


@interpreted
def test_large_time_steps_forget_everything(rng):
    """exp(delta A) underflows to zero: the state is the last input's, and nothing is NaN."""
    args = arguments(rng, 1, 19, 6, 1, optional=False)
    args |= {"dt": args["dt"] + 1e6, "A": args["A"] - 1}
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, tile=TILE))
    (_, state), gradients = run_with_gradients(args, cotangents, TILE)
    last = (args["dt"] * args["u"])[:, -1, :, None] * args["B"][:, -1, None, :]
    np.testing.assert_allclose(state, last, rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in gradients.values())


@interpreted
def test_softplus_has_a_small_relative_error_everywhere():
    """Of a state that forgets nothing (A = 0) and is fed once, the state is the time step."""
    dt = jnp.linspace(-80, 80, 96, dtype=jnp.float32)[None, None]
    ones, zeros = jnp.ones((1, 1, 96)), jnp.zeros((96, 1))
    args = {"u": ones, "dt": dt, "A": zeros, "D": zeros[:, 0]}
    _, state = run(args | {"B": ones[..., :1], "C": ones[..., :1]}, TILE)
    expected = np.log1p(np.exp(np.asarray(dt, np.float64)))
    np.testing.assert_allclose(state[0, :, 0], expected[0, 0], rtol=1e-6)


@interpreted
def test_two_calls_continue_one(rng):
    args, cut = arguments(rng, 1, 24, 5, 3), 13
    args["segment_ids"] = args["segment_ids"].at[:, cut].set(args["segment_ids"][:, cut - 1])
    names = [*PER_TOKEN, "segment_ids"]
    y_first, state = run(args | {name: args[name][:, :cut] for name in names}, TILE)
    rest = {name: args[name][:, cut:] for name in names} | {"initial_state": state}
    y_second, state = run(args | rest, TILE)
    whole = jax.tree.map(np.asarray, run(args, TILE))
    assert_close((jnp.concatenate([y_first, y_second], 1), state), whole, 1e-6)


@interpreted
def test_a_document_is_bitwise_alone(rng):
    args, others = (arguments(rng, 1, 20, 3, 2) for _ in range(2))
    start = int(rng.integers(1, 20))
    args["segment_ids"] = jnp.asarray(np.arange(20) >= start, jnp.int32)[None]
    perturbed = args | {"initial_state": others["initial_state"]}
    for name in PER_TOKEN:
        perturbed[name] = args[name].at[:, :start].set(others[name][:, :start])

    def after_start(args):
        ones = jnp.ones((1, 20, 3)), jnp.ones((1, 3, 2))
        (y, state), gradients = run_with_gradients(args, ones, TILE)
        return [state, y[:, start:]] + [gradients[name][:, start:] for name in PER_TOKEN]

    for a, b in zip(after_start(args), after_start(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)


@interpreted
def test_sharded_inside_scan_and_checkpoint(rng):
    """Two layers over two devices have the gradients that they have on one."""
    tile = backend.Tile(tokens=2, channels=32)
    args = arguments(rng, 2, 3, 3, 2)
    names = ["u", "dt", "B", "C", "z", "segment_ids", "initial_state"]
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    specs = {name: P("data") if name in names else P() for name in args}

    def loss(floats, layers):
        def block(u, D):
            return run(args | floats | {"u": u, "D": D}, tile)[0], None

        return jax.lax.scan(jax.checkpoint(block), floats["u"], layers)[0]

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    layers = jnp.stack([args["D"], -args["D"]])

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=P("data"))
    def sharded(args, layers):
        def block(u, D):
            return run(args | {"u": u, "D": D}, tile)[0], None

        return jax.lax.scan(jax.checkpoint(block), args["u"], layers)[0]

    dy = jnp.asarray(rng.standard_normal((2, 3, 3)), jnp.float32)

    def gradients(function):
        return jax.jit(lambda *x: jax.vjp(function, *x)[1](dy))(floats, layers)

    of_mesh = gradients(lambda floats, layers: sharded(args | floats, layers))
    assert_close(of_mesh, jax.tree.map(np.asarray, gradients(loss)), 1e-5)


def launches(function, *args):
    """The launches of a function of (run, ...), without running them."""
    seen = []

    def record(launch):
        seen.append(launch)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in launch.outputs.values())

    jax.eval_shape(partial(function, record), *args)
    return seen


@pytest.mark.parametrize("optional", [True, False])
def test_states_are_kept_only_for_the_gradient(rng, optional):
    args = arguments(rng, 2, 40, 70, 3, jnp.bfloat16, optional=optional)
    args = dict.fromkeys(OPTIONAL) | args

    def scan(run, floats):
        return backend.scan_with(run, TILE, **args | floats)

    def gradient(run, floats):
        outputs, vjp = jax.vjp(partial(scan, run), floats)
        return vjp(outputs)

    floats = {name: args[name] for name in ("u", "dt", "A", "B", "C", "D")}
    (forward,) = launches(scan, floats)
    assert forward.outputs["starts"].shape == (1,)
    assert not forward.constants["KEEPS_STARTS"]
    forward, backward = launches(gradient, floats)
    assert forward.outputs["starts"].shape == (2, 5, 3, 70)
    assert forward.constants["KEEPS_STARTS"]
    assert backward.grid == (3, 2)
    assert backward.outputs["dB"].shape == (3, 2, 3, 40)


def test_refusals(monkeypatch):
    args = dict.fromkeys(OPTIONAL) | arguments(np.random.default_rng(0), 1, 2, 3, 4)
    shapes = jax.eval_shape(lambda: args)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "the compute capability of cpu is not known" in backend.unsupported(**shapes)
    monkeypatch.setattr(backend, "target_capability", lambda: 75)
    assert "it takes a compute capability of 80" in backend.unsupported(**shapes)
    monkeypatch.setattr(backend, "target_capability", lambda: 90)
    assert backend.unsupported(**shapes) is None
    half = jax.ShapeDtypeStruct((1, 2, 3), jnp.float16)
    assert backend.unsupported(**shapes | {"z": half}) == "z is float16, not bfloat16 or float32"
    large = jax.ShapeDtypeStruct((65536, 2, 3), jnp.float32)
    assert "batch size 65536" in backend.unsupported(**shapes | {"u": large})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "jax_triton" or None)
    assert backend.unsupported(**shapes) == "the package jax-triton is not installed"


def test_what_is_timed(rng):
    """Through jax-triton, as far as a machine without a GPU goes: to the shapes."""
    pytest.importorskip("jax_triton", exc_type=ImportError)
    args = dict.fromkeys(OPTIONAL) | arguments(rng, 2, 40, 70, 3, jnp.bfloat16)
    args["dt_bias"] = None
    order = ["u", "dt", "A", "B", "C", "D", *OPTIONAL]
    shapes = jax.eval_shape(lambda: [args[name] for name in order])
    present = [x for x in shapes if x is not None]
    results = jax.eval_shape(partial(backend.forward_and_backward, TILE, shapes), *present)
    expected = [args[name].shape for name in order if name not in ("dt_bias", "segment_ids")]
    assert [x.shape for x in results] == expected


@interpreted
@pytest.mark.parametrize("tile", ["16,24", "12,32", "16,64"])
def test_a_tile_that_is_none(monkeypatch, tile):
    monkeypatch.setenv("FLOWHN_SELECTIVE_SCAN_TILE", tile)
    args = dict.fromkeys(OPTIONAL) | arguments(np.random.default_rng(0), 1, 2, 3, 4)
    with pytest.raises(ValueError, match=rf"powers of two, at most 32 channels; found {tile}"):
        backend.selective_scan(**args)
