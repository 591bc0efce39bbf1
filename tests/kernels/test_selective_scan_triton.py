"""The Triton kernels, in Triton's interpreter on the CPU."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.selective_scan import triton as backend
from tests.kernels import triton_interpreter
from tests.kernels.reference import assert_close
from tests.kernels.scans import Scan, scan_arguments, scan_inputs
from tests.kernels.test_selective_scan import PER_TOKEN, last_input
from tests.kernels.triton_checks import needs_triton

pytestmark = needs_triton


@functools.cache
def scan_of(tokens, channels, warps):
    tile = backend.Tile(tokens, channels, warps)

    def run(args):
        return backend.scan_with(triton_interpreter.run, tile, scan_inputs(args))

    return Scan(run, formulas.selective_scan, PER_TOKEN)


TILE = backend.Tile(tokens=8, channels=32, warps=2)
SCAN = scan_of(*TILE)


@pytest.mark.parametrize(
    ("tile", "length", "width", "states", "optional"),
    [
        ((16, 32, 4), 1, 5, 8, True),
        ((8, 32, 1), 7, 33, 2, True),
        ((16, 32, 2), 33, 5, 2, True),
        ((8, 32, 4), 19, 5, 3, False),
        ((8, 16, 2), 9, 17, 3, True),
        ((16, 8, 1), 17, 3, 8, False),
        ((4, 8, 8), 5, 8, 16, True),
        ((2, 4, 2), 3, 2, 64, True),
        ((1, 32, 1), 3, 2, 2, True),
        pytest.param((16, 32, 4), 33, 5, 3, False, marks=pytest.mark.slow),
        pytest.param((32, 32, 8), 35, 33, 16, True, marks=pytest.mark.slow),
        pytest.param((16, 16, 1), 20, 33, 128, True, marks=pytest.mark.slow),
        pytest.param((16, 32, 2), 440, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32, 4), 584, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32, 1), 1025, 7, 2, True, marks=pytest.mark.slow),
        pytest.param((16, 32, 8), 18, 192, 4, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, tile, length, width, states, optional):
    batch = 2 if length < 8 else 1
    args = scan_arguments(rng, batch, length, width, states, optional=optional)
    scan_of(*tile).check_against_float64(rng, args)


@pytest.mark.parametrize("exceptions", [[], ["dt", "C"]])
def test_bfloat16(rng, exceptions):
    args = scan_arguments(rng, 1, 19, 5, 3, jnp.bfloat16)
    args |= {name: args[name].astype(jnp.float32) for name in exceptions}
    SCAN.check_against_float64(rng, args, 1e-2, 1e-2)


def test_large_time_steps_forget_everything(rng):
    args = scan_arguments(rng, 1, 19, 6, 1, optional=False)
    SCAN.check_large_time_steps_forget(rng, args, last_input)


def test_softplus_has_a_small_relative_error_everywhere():
    """With A = 0, which forgets nothing, and one input of 1, the state is the time step."""
    dt = jnp.linspace(-80, 80, 96, dtype=jnp.float32)[None, None]
    ones, zeros = jnp.ones((1, 1, 96)), jnp.zeros((96, 1))
    args = {"u": ones, "dt": dt, "A": zeros, "D": zeros[:, 0]}
    _, state = SCAN.run(args | {"B": ones[..., :1], "C": ones[..., :1]})
    expected = np.log1p(np.exp(np.asarray(dt, np.float64)))
    np.testing.assert_allclose(state[0, :, 0], expected[0, 0], rtol=1e-6)


def test_two_calls_continue_one(rng):
    SCAN.check_two_calls_continue_one(scan_arguments(rng, 1, 24, 5, 3), 13, 1e-6)


def test_a_document_is_bitwise_alone(rng):
    SCAN.check_the_second_document_is_bitwise_alone(rng, lambda: scan_arguments(rng, 1, 20, 3, 2))


def test_sharded_inside_scan_and_checkpoint(rng):
    """Two layers on two devices have the gradients that they have on one."""
    run = scan_of(2, 32, 1).run
    args = scan_arguments(rng, 2, 3, 3, 2)
    names = ["u", "dt", "B", "C", "z", "segment_ids", "initial_state"]
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    specs = {name: P("data") if name in names else P() for name in args}

    def loss(floats, layers):
        def block(u, D):
            return run(args | floats | {"u": u, "D": D})[0], None

        return jax.lax.scan(jax.checkpoint(block), floats["u"], layers)[0]

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    layers = jnp.stack([args["D"], -args["D"]])

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=P("data"))
    def sharded(args, layers):
        def block(u, D):
            return run(args | {"u": u, "D": D})[0], None

        return jax.lax.scan(jax.checkpoint(block), args["u"], layers)[0]

    dy = jnp.asarray(rng.standard_normal((2, 3, 3)), jnp.float32)

    def gradients(function):
        return jax.jit(lambda *x: jax.vjp(function, *x)[1](dy))(floats, layers)

    of_mesh = gradients(lambda floats, layers: sharded(args | floats, layers))
    assert_close(of_mesh, jax.tree.map(np.asarray, gradients(loss)), 1e-5)


@pytest.mark.parametrize(
    "tile", ["16,24,4", "12,32,4", "16,64,4", "64,32,4", "16,32,3", "16,32,16"]
)
def test_a_tile_that_is_not_valid(monkeypatch, tile):
    monkeypatch.setenv("FLOWHN_SELECTIVE_SCAN_TILE", tile)
    args = scan_arguments(np.random.default_rng(0), 1, 2, 3, 4)
    with pytest.raises(ValueError, match=rf"powers of two of at most 32,32,8.*; got {tile}"):
        backend.selective_scan(scan_inputs(args))
