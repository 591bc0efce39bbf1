"""The TPU kernels of state-space duality, compiled for every generation of TPUs."""

import jax
import jax.numpy as jnp
import pytest

from kernels.ssd import pallas_tpu
from tests.aot import tpu_target
from tests.kernels.reference import with_gradients
from tests.kernels.test_ssd import ssd_inputs, ssd_specs

pytestmark = pytest.mark.aot

MIB = 2**20

every_generation = pytest.mark.parametrize("topology", tpu_target.GENERATIONS.values())


def arguments(batch, length, heads, groups, size, states, dtype, *, stateful):
    """Return shapes of the arguments and of the cotangents of (y, final state)."""

    def tokens(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((batch, length, *shape), dtype)

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    args = {"x": tokens(heads, size), "dt": tokens(heads, dtype=jnp.float32)}
    args |= {name: tokens(groups, states) for name in ("B", "C")}
    args |= {name: floats(heads) for name in ("A", "D", "dt_bias")}
    state = floats(batch, heads, size, states)
    if stateful:
        args |= {"segment_ids": tokens(dtype=jnp.int32), "initial_state": state}
    return args, (tokens(heads, size), state)


def scan(args):
    return pallas_tpu.ssd(ssd_inputs(args))


def training_step(args, dy):
    """Return outputs and gradients without the final state; x, y and dy are [B, L, H P]."""

    def run(args):
        x, B = args["x"], args["B"]
        heads = x.reshape(*x.shape[:2], args["A"].size, -1)
        groups = {name: args[name].reshape(*B.shape[:2], 1, -1) for name in ("B", "C")}
        return scan(args | groups | {"x": heads})[0].reshape(x.shape)

    return with_gradients(run)(args, dy)


def flat(x):
    return jax.ShapeDtypeStruct((*x.shape[:2], x.shape[2] * x.shape[3]), x.dtype)


@every_generation
def test_memory_and_traffic_of_training(topology):
    """Mamba-2 130M, 16 sequences of 1024 tokens: no T x T matrix leaves VMEM.

    Reading x and dy and writing y and dx takes 0.25 GB with x read twice, writing and reading the
    states before the chunks 0.2 GB. The T x T matrices would be 0.2 GB each.
    """
    args, (dy, _) = arguments(16, 1024, 24, 1, 64, 128, jnp.bfloat16, stateful=False)
    args |= {name: flat(args[name]) for name in ("x", "B", "C")}
    args, dy = tpu_target.on_one_device(topology, (args, flat(dy)))
    compiled = jax.jit(training_step).lower(args, dy).compile()
    around = tpu_target.traffic_around_kernels(compiled.as_text())
    kernels = tpu_target.kernel_traffic(jax.make_jaxpr(training_step)(args, dy).jaxpr)
    print("MiB", compiled.memory_analysis().temp_size_in_bytes / MIB, kernels / 1e9, around / 1e9)
    assert kernels > 0.45e9
    assert kernels + around <= 0.53e9
    assert compiled.memory_analysis().temp_size_in_bytes <= 100 * MIB


@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_over_batch_and_heads(groups):
    mesh = tpu_target.mesh("v5e:2x2", data=2, model=2)
    args, cotangents = arguments(4, 300, 8, groups, 64, 128, jnp.bfloat16, stateful=True)
    compiled = tpu_target.compile_sharded(scan, mesh, args, cotangents, ssd_specs(groups))
    assert compiled.count('custom_call_target="tpu_custom_call"') == 2
    assert "all-reduce" in compiled  # of the gradients of replicated arguments


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_stateful_odd_length(dtype):
    shapes = arguments(2, 300, 6, 2, 64, 128, dtype, stateful=True)
    jax.jit(with_gradients(scan)).lower(*tpu_target.on_one_device("v5e:2x2", shapes)).compile()


@pytest.mark.slow
@every_generation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "states"),
    [
        (8192, 24, 1, 64, 128),  # Mamba-2 130M
        (1024, 64, 1, 64, 256),  # Falcon-H1 1B
        (440, 128, 1, 64, 256),
        (440, 24, 8, 64, 64),
        (1, 16, 4, 24, 16),
        (7, 6, 3, 3, 4),
        (300, 2, 1, 130, 256),
    ],
)
def test_compiles(topology, dtype, length, heads, groups, size, states):
    shapes = arguments(1, length, heads, groups, size, states, dtype, stateful=True)
    jax.jit(with_gradients(scan)).lower(*tpu_target.on_one_device(topology, shapes)).compile()
