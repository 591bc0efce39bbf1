"""The selective scan's Triton kernels, compiled for NVIDIA GPUs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from kernels.selective_scan import triton as backend
from tests.aot import cuda_target
from tests.kernels.reference import with_gradients
from tests.kernels.scans import scan_inputs
from tests.kernels.triton_checks import launches

pytestmark = pytest.mark.aot

PER_SEQUENCE = {"u", "dt", "B", "C", "z", "segment_ids", "initial_state"}


def arguments(batch, length, width, states, dtype):
    """Return the shapes of all arguments, including the optional ones."""
    tokens = jax.ShapeDtypeStruct((batch, length, width), dtype)
    inputs = jax.ShapeDtypeStruct((batch, length, states), dtype)
    channels = jax.ShapeDtypeStruct((width,), jnp.float32)
    return {
        "u": tokens,
        "dt": tokens,
        "A": jax.ShapeDtypeStruct((width, states), jnp.float32),
        "B": inputs,
        "C": inputs,
        "D": channels,
        "z": tokens,
        "dt_bias": channels,
        "segment_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "initial_state": jax.ShapeDtypeStruct((batch, width, states), jnp.float32),
    }


def scan(run, args, tile=backend.DEFAULT):
    return backend.scan_with(run, tile, scan_inputs(args))


@pytest.mark.parametrize("capability", cuda_target.ARCHITECTURES)
@pytest.mark.parametrize(
    ("length", "width", "states", "dtype"),
    [
        (1024, 1536, 16, jnp.bfloat16),
        *(
            pytest.param(*shape, dtype, marks=pytest.mark.slow)
            for shape in [(2048, 1536, 16), (8192, 2048, 16), (4096, 2048, 64), (32768, 4096, 128)]
            for dtype in (jnp.bfloat16, jnp.float32)
        ),
    ],
)
def test_registers_do_not_spill(length, width, states, dtype, capability):
    assert_nothing_spills(length, width, states, dtype, capability, backend.DEFAULT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tile", backend.candidates(scan_inputs(arguments(1, 16, 32, 16, jnp.bfloat16)))
)
def test_no_tile_spills_registers(tile):
    assert_nothing_spills(2048, 1536, 16, jnp.bfloat16, 90, tile)


def assert_nothing_spills(length, width, states, dtype, capability, tile):
    pytest.importorskip("triton", reason="compiles by Triton")
    from kernels.selective_scan import triton_kernels

    args = arguments(8, length, width, states, dtype)
    found = launches(lambda run, args: with_gradients(partial(scan, run, tile=tile))(args), args)
    assert [launch.kernel for launch in found] == ["forward", "backward"]
    for launch in found:
        kernel = getattr(triton_kernels, launch.kernel)
        needs = cuda_target.compile_kernel(kernel, launch, capability)
        print(launch.kernel, tile, capability, needs)
        assert needs.spilled == 0


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_forward_and_backward_for_an_h100(devices):
    batch, length, width, states = 8, 2048, 1536, 16
    args = arguments(batch, length, width, states, jnp.bfloat16)
    run = partial(backend.call_triton, compute_capability=90)
    compiled = cuda_target.compile_over_batch(partial(scan, run), args, PER_SEQUENCE, devices)
    memory = compiled.memory_analysis()
    tokens = batch * length * width // devices
    print("temporary memory in MiB", memory.temp_size_in_bytes / 2**20)
    # The states before the chunks and the programs' sums: states / 4 bytes of each.
    assert memory.temp_size_in_bytes < 1.1 * tokens * 2 * states / 4
