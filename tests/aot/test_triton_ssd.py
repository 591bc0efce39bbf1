"""The Triton kernels of state-space duality, compiled for NVIDIA GPUs."""

from functools import partial

import jax.numpy as jnp
import pytest

from kernels.ssd import triton as backend
from tests.aot import cuda_target
from tests.aot.test_pallas_ssd import arguments
from tests.kernels.reference import with_gradients
from tests.kernels.test_ssd import ssd_inputs
from tests.kernels.triton_checks import launches

pytestmark = pytest.mark.aot

PER_SEQUENCE = {"x", "dt", "B", "C", "segment_ids", "initial_state"}


def scan(run, args):
    return backend.ssd_with(run, backend.DEFAULT, ssd_inputs(args))


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

    args, _ = arguments(8, 1024, heads, 1, 64, states, dtype, stateful=True)
    found = launches(lambda run, args: with_gradients(partial(scan, run))(args), args)
    assert len(found) == 5
    for launch in found:
        kernel = getattr(triton_kernels, launch.kernel)
        needs = cuda_target.compile_kernel(kernel, launch, capability)
        print(launch.kernel, launch.grid, capability, needs)
        assert needs.spilled <= spilled


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_forward_and_backward_for_an_h100(devices):
    args, _ = arguments(16, 1024, 24, 1, 64, 128, jnp.bfloat16, stateful=True)
    run = partial(backend.call_triton, compute_capability=90)
    compiled = cuda_target.compile_over_batch(partial(scan, run), args, PER_SEQUENCE, devices)
    memory = compiled.memory_analysis()
    states = 2 * args["x"].size * 128 // 64 // devices  # before and after chunks of 64, bfloat16
    print("temporary memory in MiB", memory.temp_size_in_bytes / 2**20, "states", states / 2**20)
    assert memory.temp_size_in_bytes < 2 * 1.2 * states
