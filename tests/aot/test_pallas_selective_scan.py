"""The TPU kernels of the selective scan, compiled for every generation of TPUs."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from kernels.selective_scan import pallas_tpu
from tests.aot import tpu_target
from tests.kernels.reference import with_gradients
from tests.kernels.scans import scan_inputs, scan_specs

pytestmark = pytest.mark.aot

MIB = 2**20

every_generation = pytest.mark.parametrize("topology", tpu_target.GENERATIONS.values())


def arguments(batch, length, width, states, dtype, *, stateful):
    """Return shapes of the arguments and of the cotangents of (y, final state)."""

    def tokens(size):
        return jax.ShapeDtypeStruct((batch, length, size), dtype)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    args = {name: tokens(width) for name in ("u", "dt", "z")}
    args |= {name: tokens(states) for name in ("B", "C")}
    args |= {"A": floats(width, states), "D": floats(width), "dt_bias": floats(width)}
    if stateful:
        args["segment_ids"] = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        args["initial_state"] = floats(batch, width, states)
    return args, (tokens(width), floats(batch, width, states))


def scan(args):
    return pallas_tpu.selective_scan(scan_inputs(args))


def training_step(args, dy):
    """Return outputs and gradients without the final state."""
    return with_gradients(lambda args: scan(args)[0])(args, dy)


@every_generation
def test_memory_and_traffic_of_training(topology):
    """Eight sequences of 2048 tokens need at most 40 MiB of temporaries and 0.8 GB of traffic.

    Reading u, dt, z and dy and writing y and the gradients of u, dt and z takes 0.55 GB.
    """
    args, (dy, _) = arguments(8, 2048, 1536, 16, jnp.bfloat16, stateful=False)
    args, dy = tpu_target.on_one_device(topology, (args, dy))
    compiled = jax.jit(training_step).lower(args, dy).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 40 * MIB
    kernels = tpu_target.kernel_traffic(jax.make_jaxpr(training_step)(args, dy).jaxpr)
    assert kernels > 0.55e9
    assert kernels + tpu_target.traffic_around_kernels(compiled.as_text()) <= 0.8e9


def test_stateful_odd_length():
    arguments_ = arguments(2, 1025, 1536, 16, jnp.bfloat16, stateful=True)
    shapes = tpu_target.on_one_device("v5e:2x2", arguments_)
    jax.jit(with_gradients(scan)).lower(*shapes).compile()


def test_sharded_over_batch_and_width():
    mesh = tpu_target.mesh("v5e:2x2", data=2, model=2)
    args, cotangents = arguments(4, 300, 512, 16, jnp.bfloat16, stateful=True)
    compiled = tpu_target.compile_sharded(scan, mesh, args, cotangents, scan_specs(args))
    assert compiled.count('custom_call_target="tpu_custom_call"') == 2
    assert "all-reduce" in compiled  # of the gradients of replicated arguments


PAPER = list(itertools.product([1024, 2048, 8192, 32768], [1536, 2048, 4096], [16]))
ODD = list(itertools.product([1, 7, 440, 584, 1025], [1536, 192], [16]))
STATES = list(itertools.product([1025, 2048], [1536], [3, 32, 64, 128]))


@pytest.mark.slow
@every_generation
@pytest.mark.parametrize("stateful", [False, True], ids=["stateless", "stateful"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("length", "width", "states"), PAPER + ODD + STATES)
def test_compiles(topology, dtype, stateful, length, width, states):
    shapes = arguments(1, length, width, states, dtype, stateful=stateful)
    jax.jit(with_gradients(scan)).lower(*tpu_target.on_one_device(topology, shapes)).compile()
