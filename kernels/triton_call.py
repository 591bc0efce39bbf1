"""Running Triton kernels through jax-triton, for all operations that have such kernels."""

import importlib.util
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax import Array

from kernels.backends import target_capability, target_device_kind
from kernels.manual_axes import vary_alike

_MIN_CAPABILITY = 80  # the first with bfloat16


class Launch(NamedTuple):
    """One run of a kernel."""

    kernel: str  # name of a function in the operation's module of kernels
    inputs: tuple[Array, ...]
    outputs: dict[str, jax.ShapeDtypeStruct]  # in the kernel's order
    grid: tuple[int] | tuple[int, int] | tuple[int, int, int]
    constants: dict[str, Any]
    warps: int  # per program
    stages: int = 1  # of loops that load ahead


Run = Callable[[Launch], tuple[Array, ...]]


def unsupported() -> str | None:
    """Return why this GPU or installation cannot run Triton kernels; None if it can.

    Assumes that the program is compiled for an NVIDIA GPU.
    """
    capability = target_capability()
    if capability is None:
        return f"the compute capability of {target_device_kind()} is not known"
    if capability < _MIN_CAPABILITY:
        return f"it needs a compute capability of {_MIN_CAPABILITY}, this GPU's is {capability}"
    for module, package in {"triton": "triton", "jax_triton": "jax-triton"}.items():
        if importlib.util.find_spec(module) is None:
            return f"the package {package} is not installed: pip install {package}"
    return None


def for_target(call: Callable[..., tuple[Array, ...]]) -> Run:
    """Return a `call` of an operation's kernels, compiled for the GPU that JAX compiles for."""
    return partial(call, compute_capability=target_capability())


def execute(run: Run, launch: Launch) -> dict[str, Array]:
    """Run a kernel and return its results by name."""
    # jax-triton does not declare that the results vary over devices.
    results = vary_alike((launch.inputs, tuple(run(launch))))[1]
    return dict(zip(launch.outputs, results, strict=True))


def call(
    kernels: ModuleType, prefix: str, launch: Launch, compute_capability: int | None = None
) -> tuple[Array, ...]:
    """Run a kernel through jax-triton.

    Args:
      kernels: the module with the kernel.
      prefix: what the kernel's name in profiles begins with.
      launch: the kernel and its arrays.
      compute_capability: that of the GPU to compile for, as 90; None: the local GPU's. Without a
        GPU the call can only be compiled.
    """
    import jax_triton

    return jax_triton.triton_call(
        *launch.inputs,
        kernel=getattr(kernels, launch.kernel),
        name=f"{prefix}_{launch.kernel}",
        out_shape=tuple(launch.outputs.values()),
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=compute_capability,
        **launch.constants,
    )
