"""Machines by name, such as 'v5e:4x4' or 'gpu:h100x8': devices, memory and links."""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax.experimental import topologies

from flowhn_jax.utils.text import short_repr

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device is not a type to the checker

GIB = 2**30

_PLANE = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_CUBE = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"
# The slices that Google Cloud offers, by TPU generation.
_SHAPES = {
    "v4": _CUBE.split(),
    "v5e": _PLANE.split(),
    "v5p": [*_CUBE.split(), "16x16x24"],
    "v6e": _PLANE.split(),
}
_H100_NODE = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory and link rates of a chip; rates are per direction, in bytes per second.

    TPUs: Google Cloud's pages on v4, v5e, v5p and v6e; a link's rate is the bidirectional rate per
    chip divided by twice the ports, the network's rate that of a host divided by its chips. H100:
    NVIDIA's data sheet of the SXM version, and 400 Gb/s InfiniBand per GPU.

    Attributes:
      memory: bytes that libtpu or XLA leave to a program.
      link_rate: the rate of one TPU link, or of a GPU to its node's switch.
      network_rate: the rate of a chip to other slices or nodes.
      latency: seconds per hop.
      wraps: dimensions of a torus that are multiples of this are rings; None for GPUs.
    """

    memory: int
    link_rate: float
    network_rate: float
    latency: float
    wraps: int | None = None


_CHIPS = {
    "v4": Chip(int(30.75 * GIB), 50e9, 6.25e9, 1e-6, wraps=4),
    "v5e": Chip(int(15.75 * GIB), 50e9, 3.125e9, 1e-6, wraps=16),
    "v5p": Chip(int(95.73 * GIB), 100e9, 6.25e9, 1e-6, wraps=4),
    "v6e": Chip(int(31.24 * GIB), 100e9, 12.5e9, 1e-6, wraps=16),
    "h100": Chip(84942979072, 450e9, 50e9, 1e-5),
}

# The description of a GPU that XLA needs to compile for it.
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


# Without the first two libtpu queries the network for local TPUs and allows one process only;
# without the others it reports that there are none. They do not affect the target topology.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine, or several slices connected by the network."""

    name: str
    slices: int
    chip: Chip
    shape: tuple[int, ...]  # of a TPU slice; for GPUs (nodes, GPUs per node)
    devices: "tuple[Device, ...]"

    @property
    def is_gpu(self) -> bool:
        """Whether its devices are GPUs in nodes, rather than TPUs in a torus."""
        return self.chip.wraps is None

    def seconds(self, group: "Sequence[Device]", received: float) -> float:
        """Return the time in which each device of a group can receive bytes from all others.

        In a torus the chip with the fewest links to the group determines the time: in a box of
        chips a corner, with one link per dimension, or two if the dimension is a ring. Groups that
        are not whole boxes share their box's links; other contention is not modelled. The time is
        at least the latency of the hops along the box's diagonal.

        Args:
          group: the devices.
          received: bytes that each device receives.
        """
        chip, size = self.chip, len(group)
        if size == 1:
            return 0.0
        parts: dict[int, list[Device]] = {}
        for device in group:
            parts.setdefault(self._slice(device), []).append(device)
        if len(parts) > 1:  # one device per part receives from the network and passes it on
            from_network = received * (len(parts) - 1) / (size - 1) / chip.network_rate
            within = max(self.seconds(part, received) for part in parts.values())
            return max(from_network, within, chip.latency)
        if self.is_gpu:
            return max(received / chip.link_rate, chip.latency)
        spans = [len({device.coords[i] for device in group}) for i in range(3)]
        used = [
            max(device.coords[i] for device in group) - min(device.coords[i] for device in group)
            for i in range(3)
        ]
        shape = (*self.shape, 1)[:3]
        links = sum(
            2 if span == side and self._is_ring(i) else 1
            for i, (span, side) in enumerate(zip(spans, shape, strict=True))
            if span > 1
        )
        shared = math.prod(extent + 1 for extent in used) / size
        return max(received * shared / (links * chip.link_rate), sum(used) * chip.latency)

    def seconds_of_pairs(self, pairs: "Sequence[tuple[Device, Device]]", received: float) -> float:
        """Return the time in which the second device of each pair receives bytes from the first.

        In a torus a message occupies a link per hop, so the average load of a link is the mean
        number of hops.

        Args:
          pairs: the pairs of devices.
          received: bytes per pair.
        """
        chip = self.chip
        if any(self._slice(a) != self._slice(b) for a, b in pairs):
            return max(received / chip.network_rate, chip.latency)
        if self.is_gpu:
            return max(received / chip.link_rate, chip.latency)
        hops = [self._hops(a, b) for a, b in pairs]
        load = max(1.0, sum(hops) / len(hops))
        return max(received * load / chip.link_rate, max(hops) * chip.latency)

    def _hops(self, a: "Device", b: "Device") -> int:
        """Return the number of links between two chips of a slice."""
        total = 0
        for i, side in enumerate((*self.shape, 1)[:3]):
            apart = abs(a.coords[i] - b.coords[i])
            total += min(apart, side - apart) if self._is_ring(i) else apart
        return total

    def _is_ring(self, dimension: int) -> bool:
        """Return whether a dimension of a TPU slice is a ring; in 3D only those of cubes are."""
        sides = self.shape if len(self.shape) == 3 else self.shape[dimension : dimension + 1]
        wraps = self.chip.wraps
        return wraps is not None and bool(sides) and all(side % wraps == 0 for side in sides)

    def _slice(self, device: "Device") -> int:
        """Return the index of the slice or node of a device."""
        if self.is_gpu:
            return device.id // self.shape[1]
        return getattr(device, "slice_index", None) or 0


def names() -> str:
    """Return the known topologies, for messages."""
    tpus = "; ".join(f"{kind}:{' '.join(shapes)}" for kind, shapes in _SHAPES.items())
    return f"{tpus}; gpu:h100xN with N at most {_H100_NODE}, or a multiple of {_H100_NODE}"


def describe(name: str, slices: int = 1) -> Topology:
    """Return the topology of a name.

    Args:
      name: such as 'v5e:4x4' or 'gpu:h100x8'.
      slices: number of TPU slices, connected by the network.

    Raises:
      ValueError: the topology is unknown, or `slices` is not possible for it.
      ImportError: its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind == "gpu":
        model, _, count = shape.partition("x")
        ok = model == "h100" and count.isdecimal() and int(count) > 0
        ok = ok and (int(count) <= _H100_NODE or int(count) % _H100_NODE == 0)
    else:
        ok = shape in _SHAPES.get(kind, ())
    if not ok:
        raise ValueError(f"--topology must be one of {names()}; got {short_repr(name)}.")
    if slices < 1 or (kind == "gpu" and slices > 1):
        kinds = "1 for GPUs" if kind == "gpu" else "at least 1"
        raise ValueError(f"--num_slices must be {kinds} with --topology={name}; got {slices}.")
    if kind == "gpu":
        total = int(count)
        node = min(total, _H100_NODE)
        return Topology(name, 1, _CHIPS["h100"], (total // node, node), _gpus(total))
    sides = tuple(map(int, shape.split("x")))
    return Topology(name, slices, _CHIPS[kind], sides, _tpus(name, slices))


@functools.cache
def _tpus(name: str, slices: int) -> "tuple[Device, ...]":
    _need("libtpu", name)
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device
    return tuple(topologies.get_topology_desc(name, "tpu", **options).devices)


@functools.cache
def _gpus(count: int) -> "tuple[Device, ...]":
    _need("jax_cuda13_plugin", "GPUs")
    # Otherwise the plugin requires the libraries of a CUDA installation.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    options = {"target_config": _H100, "topology": f"1x1x{count}"}
    return tuple(topologies.get_topology_desc("", "cuda", **options).devices)


def _need(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"Compiling for {name} needs {module}: pip install -r requirements-aot.txt."
        )
