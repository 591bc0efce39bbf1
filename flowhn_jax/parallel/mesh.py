"""The device mesh, and the shardings of a training run on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowhn_jax.config import MeshConfig


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
    """A mesh with the axis `data` over `config.data` devices.

    Raises:
      ValueError: more devices are asked for than there are, or they do not divide the batch.
    """
    devices = jax.devices()
    data = len(devices) if config.data == -1 else config.data
    if data > len(devices):
        raise ValueError(f"mesh.data is {data}, but there are {len(devices)} devices.")
    if batch_size % data:
        raise ValueError(
            f"train.batch_size / train.accumulate = {batch_size} sequences do not divide over "
            f"mesh.data = {data} devices; accepted is a multiple of {data}, or another mesh.data."
        )
    return jax.make_mesh((data,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:data])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension, sequences, is cut over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch, mesh: Mesh):
    """A process's rows of a batch (NumPy, [B / processes, ...]) -> global arrays [B, ...]."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
