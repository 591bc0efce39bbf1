"""Compilation for absent NVIDIA GPUs, by XLA's CUDA plugin and by Triton."""

import math
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.aot.topology import describe
from tests.kernels.reference import with_gradients

ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}  # by compute capability

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}


class Resources(NamedTuple):
    """Resources of one thread of a compiled kernel."""

    registers: int
    spilled: int  # bytes stored to local memory


def h100_mesh(**axes: int) -> Mesh:
    """Return a mesh of H100s with axes by name and size; skip the test without the plugin."""
    pytest.importorskip("jax_cuda13_plugin", reason="compiles by the CUDA plugin")
    devices = describe(f"gpu:h100x{math.prod(axes.values())}").devices
    devices = np.array(devices).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def needs_cudnn() -> None:
    """Skip the test if cuDNN, which plans attention, is not installed."""
    pytest.importorskip("nvidia.cudnn", reason="compiles by cuDNN")


def compile_over_batch(scan, args: dict, per_sequence: Collection[str], devices: int):
    """Return a scan and its gradients, compiled for H100s between which sequences are divided.

    It is inside `jax.shard_map`, which checks what varies between devices. Skip the test without
    the compilers.

    Args:
      scan: (y, final state) of arguments by name.
      args: their shapes and dtypes.
      per_sequence: names of those that have a dimension of sequences, the first.
      devices: how many.
    """
    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    mesh = h100_mesh(data=devices)
    specs = {name: P("data") if name in per_sequence else P() for name in args}
    args = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, x in args.items()
    }
    results = P("data"), {name: specs[name] for name in args if name != "segment_ids"}
    step = jax.shard_map(with_gradients(scan), mesh=mesh, in_specs=(specs,), out_specs=results)
    return jax.jit(step).lower(args).compile()


def compile_kernel(kernel, launch, capability: int) -> Resources:
    """Compile a Triton kernel for a launch, as jax-triton does."""
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
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    assembler = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder  # importing jax-triton unsets it
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
