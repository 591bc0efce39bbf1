"""The Triton kernels of state-space duality, compiled for NVIDIA GPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.ssd import triton as backend
from tests.aot import cuda_target
from tests.aot.test_pallas_ssd import arguments
from tests.kernels.test_ssd import ssd_inputs

pytestmark = pytest.mark.aot

SHARDED = {"x", "dt", "B", "C", "segment_ids", "initial_state"}


def with_gradients(run, args, tile=backend.DEFAULT):
    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    scan = partial(backend.ssd_with, run, tile)
    outputs, vjp = jax.vjp(lambda floats: scan(ssd_inputs(args | floats)), floats)
    return outputs, vjp(outputs)[0]


@pytest.mark.parametrize(
    ("heads", "states", "dtype", "capability", "spilled"),
    [
        (24, 128, jnp.bfloat16, 90, 0),
        pytest.param(64, 256, jnp.bfloat16, 90, 0, marks=pytest.mark.slow),
        pytest.param(24, 128, jnp.bfloat16, 80, 500, marks=pytest.mark.slow),
        pytest.param(24, 128, jnp.float32, 90, 2500, marks=pytest.mark.slow),
    ],
)
def test_registers(heads, states, dtype, capability, spilled):
    """In bfloat16 no register spills on an H100; elsewhere few bytes per thread do."""
    pytest.importorskip("triton", reason="compiles by Triton")
    from kernels.ssd import triton_kernels

    launches = []
    args, _ = arguments(8, 1024, heads, 1, 64, states, dtype, stateful=True)
    jax.eval_shape(partial(with_gradients, cuda_target.recorded(launches)), args)
    assert len(launches) == 5
    for launch in launches:
        kernel = getattr(triton_kernels, launch.kernel)
        needs = cuda_target.compile_kernel(kernel, launch, capability)
        print(launch.kernel, launch.grid, capability, needs)
        assert needs.spilled <= spilled


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_forward_and_backward_for_an_h100(devices):
    """Over two devices inside `jax.shard_map`, which checks what varies between them."""
    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    mesh = cuda_target.h100_mesh(data=devices)
    args, _ = arguments(16, 1024, 24, 1, 64, 128, jnp.bfloat16, stateful=True)
    specs = {name: P("data") if name in SHARDED else P() for name in args}
    args = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in args.items()
    }
    results = P("data"), {name: specs[name] for name in args if name != "segment_ids"}
    run = partial(backend.call_triton, compute_capability=90)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=results)
    def step(args):
        return with_gradients(run, args)

    memory = step.lower(args).compile().memory_analysis()
    states = 2 * args["x"].size * 128 // 64 // devices  # before and after chunks of 64, bfloat16
    print("temporary memory in MiB", memory.temp_size_in_bytes / 2**20, "states", states / 2**20)
    assert memory.temp_size_in_bytes < 2 * 1.2 * states
