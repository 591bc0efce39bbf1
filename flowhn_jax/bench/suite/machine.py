"""Part `machine`: the device, its software and its peak rates."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterator

import jax

from flowhn_jax import flops
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.device import measure_rates
from flowhn_jax.bench.suite.workload import Earlier, dtypes

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "triton",
    "jax-triton",
    "libtpu",
    "torch",
    "transformers",
    "mamba-ssm",
    "flash-linear-attention",
    "flash-attn",
    "mambapy",
)
_NVIDIA_SMI = "name,driver_version,memory.total,power.limit,clocks.max.sm"


def plan() -> list[str]:
    """Return 'device', then a row of rates for each dtype."""
    return ["device", *(f"rates/{dtype}" for dtype in dtypes())]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield the rows."""
    for key in missing:
        kind, _, dtype = key.partition("/")
        yield attempt(
            {"key": key}, _device if kind == "device" else lambda dtype=dtype: _rates(dtype)
        )


def describe() -> Row:
    """Return what identifies the machine; results of two machines are never mixed."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _device() -> Row:
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    return {
        **describe(),
        "summary": device.device_kind,
        "memory_bytes": statistics.get("bytes_limit"),
        "peak_bf16_flops_per_second": flops.peak_flops(device),
        "peak_bytes_per_second": flops.peak_bandwidth(device),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": _nvidia_smi(),
        "host": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _rates(dtype: str) -> Row:
    rates = measure_rates(dtype)
    return {
        "dtype": dtype,
        "bytes_per_second": rates.bytes_per_second,
        "matmul_flops_per_second": rates.matmul_flops_per_second,
        "exps_per_second": rates.exps_per_second,
        "summary": f"copies {rates.bytes_per_second / 1e9:,.0f} GB/s, products "
        f"{rates.matmul_flops_per_second / 1e12:,.2f} TFLOP/s, "
        f"{rates.exps_per_second / 1e9:,.1f} G exponentials/s",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """Return name, driver, memory, power limit and clock of the GPUs; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return run.stdout.strip().replace("\n", "; ") or None


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
