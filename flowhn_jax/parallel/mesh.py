"""The device mesh of a run: axes data, fsdp, branch, sequence and tensor, and how batches lie."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.config import MeshConfig, ModelConfig
from kernels.partition import AXES


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis, where -1 takes all that are left of `devices`.

    Raises:
      ValueError: the axes need more devices, or -1 would not come to a whole number.
    """
    sizes = dataclasses.asdict(config)
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if fixed > devices:
        raise ValueError(f"The mesh {asked} needs {fixed} devices, but there are {devices}.")
    if -1 in sizes.values() and devices % fixed:
        raise ValueError(
            f"The mesh {asked} leaves no whole number for -1: {devices} devices do not divide by "
            f"{fixed}."
        )
    return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}


def make_mesh(
    config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over the devices, all axes left to XLA (Auto).

    Neighbours along `tensor` are neighbours on the chips' links. Where the devices are several
    slices of TPUs, `data` alone goes over the network between them.

    Args:
      config: sizes of the axes.
      batch_size: sequences of a step's part, train.batch_size / train.accumulate.
      devices: those to take from; None: all that JAX sees. A mesh of fewer takes the first ones.

    Raises:
      ValueError: the mesh does not fit the devices, or the batch does not divide over it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    ways = math.prod(sizes[name] for name in AXES["B"])
    if batch_size % ways:
        raise ValueError(
            f"train.batch_size / train.accumulate = {batch_size} sequences do not divide over "
            f"mesh.data x mesh.fsdp = {sizes['data']} x {sizes['fsdp']} devices; accepted is a "
            f"multiple of {ways}, or another mesh."
        )
    used = math.prod(sizes.values())
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"The mesh {sizes} takes {used} of {len(devices)} devices; with several processes it "
            "must take all."
        )
    devices = devices[:used]
    is_tpu = devices[0].platform == "tpu"  # JAX calls the nodes of GPUs slices, too
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    # A torus's dimensions may be split: else few meshes would fit.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), **options)
    elif sizes["data"] % slices:
        raise ValueError(
            f"mesh.data = {sizes['data']} does not divide over the {slices} slices of TPUs."
        )
    else:
        in_slice = [n // slices if name == "data" else n for name, n in sizes.items()]
        of_slices = [slices if name == "data" else 1 for name in sizes]
        array = mesh_utils.create_hybrid_device_mesh(in_slice, of_slices, **options)
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_sequence(model: ModelConfig, mesh: Mesh) -> None:
    """Raise a ValueError where the model's positions or heads do not divide over the mesh.

    Else devices along `sequence` would do each other's work.
    """
    parts = mesh.shape["sequence"]
    if parts == 1:
        return
    if model.kind == "flowhn":
        _check_branches(model, parts)
    else:
        meta = model.meta_tokens if model.kind == "hymba" else 0
        if (model.context + meta) % parts:
            raise ValueError(
                f"mesh.sequence = {parts} does not divide the {model.context + meta} positions of "
                f"{model.kind}; accepted is a divisor."
            )
    ways = parts * mesh.shape["tensor"]
    if model.kind not in ("mamba1", "mamba2") and model.heads % ways:
        raise ValueError(
            f"mesh.sequence x mesh.tensor = {ways} does not divide model.heads = {model.heads}, "
            "which attention cuts instead of positions; accepted is a divisor."
        )


def _check_branches(model: ModelConfig, parts: int) -> None:
    for block in model.plan().blocks:
        for branch, selection in (("attention", block.attention), ("the SSM", block.ssm)):
            tokens = selection.count(model.context)
            if tokens % parts:
                raise ValueError(
                    f"mesh.sequence = {parts} does not divide the {tokens} tokens of {branch} in a "
                    f"context of {model.context}; accepted is a divisor, or another "
                    "model.split.align or model.split.period."
                )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension, sequences, is cut over the axes that sequences are cut over."""
    return NamedSharding(mesh, P(AXES["B"]))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """(i, n): of the n parts of a batch this process holds part i on its devices.

    Processes that hold the same sequences, as their devices differ along other axes, share a part.

    Raises:
      ValueError: the sequences of two processes overlap in part.
    """
    ways = math.prod(mesh.shape[name] for name in AXES["B"])
    indices = batch_sharding(mesh).devices_indices_map((ways,))
    held: dict[int, set[int]] = {}
    for device, (rows,) in indices.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != ways:
        raise ValueError(
            f"The mesh {dict(mesh.shape)} cuts sequences so that processes hold some of each "
            "other's; accepted is one whose branch, sequence and tensor axes lie within a "
            "process, or take whole ones."
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A process's rows of a batch (NumPy, [B / processes, ...]) -> global arrays [B, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
