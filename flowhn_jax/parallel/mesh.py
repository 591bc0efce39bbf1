"""The device mesh of a run, with axes data, fsdp, branch, sequence and tensor, and its batches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.utils.checks import require
from kernels.partition import AXES


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; one axis may be -1, which takes the rest.

    Attributes:
      data: devices over which sequences are sharded.
      fsdp: devices over which sequences are sharded, and parameters with their optimizer state.
      branch: 2 runs the attention branch on one half of the devices and the SSM branch on the
        other; 1 runs both on all.
      sequence: devices over which the positions of long sequences are sharded, and parameters with
        their optimizer state.
      tensor: devices over which heads, channels, MLP units and the vocabulary are sharded.
    """

    data: int = -1
    fsdp: int = 1
    branch: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size > 0, f"mesh.{name}", "-1 or above 0", size)
        require(self.branch in (1, 2), "mesh.branch", "1 or 2", self.branch)
        rest = [name for name, size in sizes.items() if size == -1]
        require(len(rest) <= 1, "mesh", "sizes of which at most one is -1", sizes)
        both = self.branch == 2 and self.sequence != 1
        require(not both, "mesh.sequence", "1 where mesh.branch is 2", self.sequence)


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Return the number of devices along each axis; -1 takes all that the others leave.

    Raises:
      ValueError: the axes need more than `devices`, or -1 would not be a whole number.
    """
    sizes = dataclasses.asdict(config)
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > devices:
        raise ValueError(
            f"mesh.* must not need more than the {devices} devices available; got {asked}, which "
            f"needs {fixed}. Give smaller sizes; -1 takes all devices that the others leave."
        )
    if -1 in sizes.values() and devices % fixed:
        raise ValueError(
            f"mesh.*: the product of the sizes other than -1 must divide the {devices} devices; "
            f"got {asked}, whose product is {fixed}."
        )
    return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}


def make_mesh(config: MeshConfig, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh over the devices, with all axes left to XLA (AxisType.Auto).

    Neighbours along `tensor` are neighbours on the links between chips. If the devices are several
    TPU slices, only `data` crosses the network between them.

    Args:
      config: sizes of the axes.
      batch_size: sequences per micro-batch, train.batch_size / train.accumulate.
      devices: jax.Devices to choose from, the first ones for a smaller mesh; None: all of them.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch does not divide over it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    ways = math.prod(sizes[name] for name in AXES["B"])
    if batch_size % ways:
        raise ValueError(
            "train.batch_size / train.accumulate must be a multiple of mesh.data x mesh.fsdp = "
            f"{sizes['data']} x {sizes['fsdp']}, as each device takes whole sequences; got "
            f"{batch_size}. Give another --config.train.batch_size, or a smaller mesh, for example "
            "--config.mesh.data=1."
        )
    used = math.prod(sizes.values())
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh.* must take all {len(devices)} devices in a run of several processes; got "
            f"{sizes}, which takes {used}. Set one axis to -1, for example --config.mesh.data=-1."
        )
    devices = devices[:used]
    is_tpu = devices[0].platform == "tpu"  # JAX calls nodes of GPUs slices, too
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    # Without split dimensions of the torus few meshes would fit.
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), **options)
    elif sizes["data"] % slices:
        raise ValueError(
            f"mesh.data must be a multiple of the number of TPU slices, {slices}; got "
            f"{sizes['data']}."
        )
    else:
        in_slice = [n // slices if name == "data" else n for name, n in sizes.items()]
        of_slices = [slices if name == "data" else 1 for name in sizes]
        array = mesh_utils.create_hybrid_device_mesh(in_slice, of_slices, **options)
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class SequenceSharded(Protocol):
    """A model's config, as far as sharding sequences over a mesh concerns it."""

    def check_sequence(self, sequence: int, tensor: int) -> None:
        """Raise ValueError if positions or heads do not divide over the devices."""
        ...


def check_sequence(model: SequenceSharded, mesh: Mesh) -> None:
    """Raise ValueError if the model's positions or heads do not divide over `mesh.sequence`.

    Otherwise devices along that axis would replicate each other's work.
    """
    model.check_sequence(mesh.shape["sequence"], mesh.shape["tensor"])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch [B, ...]: sequences over `data` and `fsdp`."""
    return NamedSharding(mesh, P(AXES["B"]))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Return (i, n): this process's devices hold part i of the n parts of a batch.

    Processes whose devices differ only along other axes hold the same part.

    Raises:
      ValueError: the sequences of two processes overlap partially.
    """
    ways = math.prod(mesh.shape[name] for name in AXES["B"])
    indices = batch_sharding(mesh).devices_indices_map((ways,))
    rows_of: dict[int, set[int]] = {}
    for device, (rows,) in indices.items():
        rows_of.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, parts)) != ways:
        raise ValueError(
            "mesh.branch x mesh.sequence x mesh.tensor must lie within one process or span whole "
            f"processes; with {dict(mesh.shape)} processes hold some of each other's sequences."
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Return global arrays [B, ...] of this process's rows, NumPy arrays [B / n, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
