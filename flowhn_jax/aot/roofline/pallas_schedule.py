"""Static schedules of a program's Pallas kernels, each compiled alone for the same TPU.

libtpu dumps schedules only if it is asked to when it is loaded, so a separate process compiles.
"""

import glob
import json
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from flowhn_jax.aot.hlo import Instruction, arrays
from flowhn_jax.aot.roofline.bundles import cycles
from flowhn_jax.aot.roofline.work import call_target
from flowhn_jax.aot.topology import describe

TARGET = "tpu_custom_call"
_DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
_SCHEDULE, _ANALYSIS = "final_bundles.txt", "schedule-analysis_final_bundles"
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16"}
_DTYPES |= {
    f"{code}{bits}": f"{name}{bits}"
    for code, name in (("s", "int"), ("u", "uint"))
    for bits in (8, 16, 32)
}
_DTYPES |= {"f32": "float32"}

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each array


class Kernel(NamedTuple):
    """A call of a Pallas kernel: all that its machine code depends on."""

    config: str
    operands: Shapes
    results: Shapes


def kernel_of(instruction: Instruction, instructions: dict[str, Instruction]) -> Kernel | None:
    """Return the kernel that an instruction calls; None for other instructions."""
    if call_target(instruction) != TARGET:
        return None
    text = instruction.attributes.partition("backend_config=")[2]
    fields = json.JSONDecoder().raw_decode(text)[0]
    kept = {key: fields[key] for key in ("custom_call_config", "scoped_memory_configs")}
    operands = "".join(instructions[name].result for name in instruction.operands)
    return Kernel(json.dumps(kept), _shapes(operands), _shapes(instruction.result))


def kernel_seconds(kernels: Iterable[Kernel], topology: str, clock: float) -> dict[Kernel, float]:
    """Return the seconds of each kernel's schedule; kernels that do not compile alone are missing.

    Args:
      kernels: the kernels of programs for `topology`.
      topology: the topology of the TPU, such as 'v5e:4x4'.
      clock: cycles per second.
    """
    distinct = list(dict.fromkeys(kernels))
    if not distinct:
        return {}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compile, args=(distinct, topology, sender), daemon=True)
    process.start()
    sender.close()
    found: dict[Kernel, float] = {}
    try:
        for kernel in distinct:
            count = receiver.recv()
            if count is not None:
                found[kernel] = count / clock
    except EOFError:  # libtpu ends the process if it cannot compile a kernel
        pass
    finally:
        process.kill()
        process.join()
    return found


def _compile(kernels: list[Kernel], topology: str, sender: Any) -> None:
    """Send the cycles of each kernel, None for one that does not compile."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        own = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{own} {_DUMP.format(folder)}"
        place = SingleDeviceSharding(describe(topology).devices[0])
        for kernel in kernels:
            try:
                _compile_alone(kernel, place)
            except Exception:
                sender.send(None)
            else:
                sender.send(_read(folder))
            for file in folder.iterdir():
                file.unlink()


def _compile_alone(kernel: Kernel, place: SingleDeviceSharding) -> None:
    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in kernel.results]
    call = jax.ffi.ffi_call(
        TARGET, results, custom_call_api_version=1, legacy_backend_config=kernel.config
    )
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
        for dtype, shape in kernel.operands
    ]
    jax.jit(call).lower(*operands).compile()


def _read(folder: pathlib.Path) -> int | None:
    """Return the cycles of the kernel whose schedule libtpu dumped; None if it dumped none.

    The program that starts the kernel has a schedule as well, which is short.
    """
    found = []
    for analysis in folder.glob(f"*{_ANALYSIS}*"):
        if f'custom_call_target="{TARGET}"' in analysis.read_text():
            stem = analysis.name.partition(_ANALYSIS)[0].rstrip("-").rpartition("-")[0]
            others = folder.glob(f"{glob.escape(stem)}-*{_SCHEDULE}")
            found += [cycles(x.read_text()) for x in others if _ANALYSIS not in x.name]
    return max(found, default=None)


def _shapes(result: str) -> Shapes:
    return tuple((_DTYPES[x.dtype], x.shape) for x in arrays(result))
