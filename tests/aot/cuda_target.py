"""NVIDIA GPUs to compile for where there is none: by XLA's CUDA plugin and by Triton."""

import functools
import os
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}  # by compute capability

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 ecc_enabled: true name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}


class Resources(NamedTuple):
    """What one thread of a compiled kernel needs."""

    registers: int
    spilled: int  # bytes stored to local memory


def h100_mesh(**axes: int) -> Mesh:
    """A mesh of H100s, its axes by name and size; skips the test where the plugin is missing."""
    pytest.importorskip("jax_cuda13_plugin", reason="compiles by the CUDA plugin")
    devices = np.array(_h100(int(np.prod(list(axes.values()))))).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def needs_cudnn() -> None:
    """Skips the test where cuDNN, which plans attention, is not installed."""
    pytest.importorskip("nvidia.cudnn", reason="compiles by cuDNN")


@functools.cache
def _h100(count: int) -> list:
    # Without it the plugin looks for the libraries of a CUDA installation.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x1x{count}"
    ).devices


def recorded(launches: list):
    """What runs kernels only in name: it appends each launch and returns zeros.

    For `jax.eval_shape`.
    """

    def run(launch):
        launches.append(launch)
        return tuple(jax.numpy.zeros(x.shape, x.dtype) for x in launch.outputs.values())

    return run


def compile_kernel(kernel, launch, capability: int) -> Resources:
    """Compile a Triton kernel for a launch, one warp a program, as jax-triton does."""
    triton = pytest.importorskip("triton", reason="compiles by Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = [*launch.inputs, *launch.outputs.values()]
    constants = {kernel.arg_names.index(name): x for name, x in launch.constants.items()}
    signature = {
        name: "constexpr" if i in constants else _TYPES[arrays[i].dtype.name]
        for i, name in enumerate(kernel.arg_names)
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): x for i, x in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 1, "num_stages": 1}
    assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # jax-triton, where it is imported, has set none
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        path = pathlib.Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={ARCHITECTURES[capability]}", path]
        command += ["-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=int(re.search(r"(\d+) bytes spill stores", report)[1]),
    )
