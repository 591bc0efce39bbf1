"""Compilation for absent TPUs by libtpu, which contains the whole compiler."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.aot.topology import describe
from tests.jaxprs import equations
from tests.kernels.reference import with_gradients

# The smallest topology of each generation that libtpu describes.
GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\](\{{[^}}]*\}})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)")
_MOVES_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


def devices(topology: str) -> list:
    """Return the devices of a topology such as 'v5e:2x2'; skip the test without libtpu."""
    pytest.importorskip("libtpu", reason="compiles by libtpu")
    return list(describe(topology).devices)


def on_one_device(topology: str, tree):
    """Return the shapes and dtypes of a tree, placed on the topology's first device."""
    sharding = SingleDeviceSharding(devices(topology)[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def on_mesh(mesh: Mesh, tree, specs: P):
    """Return the shapes and dtypes of a tree, sharded over a mesh by a tree of specs."""

    def place(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs)


def mesh(topology: str, **axes: int) -> Mesh:
    """Return a mesh over all devices of a topology with axes by name and size."""
    array = np.array(devices(topology)).reshape(*axes.values())
    return Mesh(array, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_sharded(scan, mesh: Mesh, args: dict, cotangents, specs) -> str:
    """Return the program of a scan and its gradients over a mesh, as text.

    It is inside `jax.shard_map`, which checks over which axes each result varies.

    Args:
      scan: (y, final state) of arguments by name.
      mesh: of a topology's devices.
      args: shapes and dtypes of the arguments.
      cotangents: those of (y, final state).
      specs: how the arguments and the results are cut.
    """
    of_args, of_results = specs
    args, cotangents = on_mesh(mesh, args, of_args), on_mesh(mesh, cotangents, of_results)
    sharded = jax.shard_map(scan, mesh=mesh, in_specs=(of_args,), out_specs=of_results)
    return jax.jit(with_gradients(sharded)).lower(args, cotangents).compile().as_text()


def kernel_traffic(jaxpr) -> int:
    """Return the bytes that a jaxpr's Pallas kernels move, by their cost estimates."""
    return sum(
        equation.params["cost_estimate"].bytes_accessed
        for equation in equations(jaxpr, opaque=("pallas_call",))
        if equation.primitive.name == "pallas_call"
    )


def traffic_around_kernels(hlo: str) -> int:
    """Return the bytes that XLA's operations read and write in main memory; no loops.

    Asynchronous moves are not counted: they prefetch to VMEM what a kernel reads.

    Args:
      hlo: text of the compiled program, where an array in VMEM is marked S(1).
    """
    entry = hlo[hlo.index("\nENTRY ") :]
    entry = re.sub(r"/\*.*?\*/", "", entry[: entry.index("\n}")])
    results, total = {}, 0
    for line in entry.splitlines():
        if found := _INSTRUCTION.match(line):
            name, result, operation, operands = found.groups()
            assert operation != "while", line
            results[name] = _main_memory(result)
            moves = operation.endswith(("-start", "-done"))
            if not (moves or operation in _MOVES_NOTHING or "tpu_custom_call" in line):
                operands = re.findall(r"%([\w.-]+)", operands)
                total += results[name] + sum(results[operand] for operand in operands)
    return total


def _main_memory(arrays: str) -> int:
    """Return the bytes of arrays such as 'bf16[8,16]{1,0:T(8,128)}' outside VMEM and SMEM."""
    return sum(
        _BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
        for dtype, shape, layout in _ARRAY.findall(arrays)
        if not re.search(r"S\([1-9]\)", layout)
    )
