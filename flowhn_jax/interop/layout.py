"""Convert parameters between the layouts of PyTorch models and of ours, by their path in ours."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.parallel.rules import with_shardings
from flowhn_jax.utils.text import short_repr

Path = tuple[str | int, ...]

EMBEDDING, HEAD = ("embed", "embedding"), ("head", "kernel")


def parse_path(text: str) -> Path:
    """Return a path such as 'blocks/0/norm/scale' as a tuple: ('blocks', 0, 'norm', 'scale')."""
    return tuple(int(part) if part.isdecimal() else part for part in text.split("/"))


def to_ours(path: Path, array: np.ndarray, ndim: int) -> np.ndarray:
    """Return an array of theirs in our layout.

    That is kernels [in, out], Mamba-1's in_proj [in, 2, out] with a bias [2, out], and convolutions
    [taps, E].

    Args:
      path: the path of the parameter in our model.
      array: the parameter in PyTorch's layout.
      ndim: number of dimensions in our layout.
    """
    if path[-1] == "conv_weight" and array.ndim == 3:
        return array[:, 0, :].T
    if path[-1] == "kernel" and ndim == 3:  # u's channels, then z's
        return array.T.reshape(array.shape[-1], 2, -1)
    if path[-1] == "bias" and ndim == 2:
        return array.reshape(2, -1)
    return array.T if path[-1] == "kernel" else array


def to_theirs(path: Path, array: np.ndarray) -> np.ndarray:
    """Return an array of ours in their layout, the inverse of `to_ours`."""
    if path[-1] == "conv_weight":
        return array.T[:, None, :]
    if path[-1] == "bias":
        return array.reshape(-1)
    return array.reshape(len(array), -1).T if path[-1] == "kernel" else array


# Makes a device's array of a parameter, by its path and its value in our layout.
Put = Callable[[Path, np.ndarray], jax.Array]


def put_whole(path: Path, array: np.ndarray) -> jax.Array:
    """Return an array in float32 on the default device."""
    del path
    return jnp.array(array, jnp.float32)  # a copy: the file that it is mapped from may change


def put_sharded(config: ModelConfig, mesh: Mesh) -> Put:
    """Return a function that makes float32 arrays sharded over the mesh, each device's part alone.

    Args:
      config: the config of the model whose parameters they are.
      mesh: whose devices get them.
    """
    abstract: dict[Path, Any] = flatten_dict(with_shardings(models.abstract_params(config), mesh))

    def put(path: Path, array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return np.array(array[index], np.float32)

        if path not in abstract:
            raise ValueError(
                "config.json ties the head to the embedding, but the files hold a head with other "
                "values; import the folder with `flowhn import`, and use that workdir."
            )
        return jax.make_array_from_callback(array.shape, abstract[path].sharding, part)

    return put


def assemble(
    config: ModelConfig,
    arrays: dict[str, np.ndarray],
    names: Mapping[str, Path],
    convert: Callable[[Path, np.ndarray, int], np.ndarray] = to_ours,
    put: Put = put_whole,
) -> Params:
    """Return the parameters of a model, in float32.

    Args:
      config: the model's config.
      arrays: their arrays, by their names; is emptied, so that each is freed once it is converted.
      names: the path of each of our parameters, by its name in their model.
      convert: converts an array to our layout, given the path and our number of dimensions.
      put: makes the devices' arrays.

    Raises:
      ValueError: a name is missing or unknown, or a shape does not fit.
    """
    unknown, missing = sorted(set(arrays) - set(names)), sorted(set(names) - set(arrays))
    if unknown or missing:
        raise ValueError(
            f"The parameters do not fit {config.name} with {config.blocks} blocks: "
            f"missing {short_repr(missing[:3])}, unknown {short_repr(unknown[:3])} "
            f"({len(missing)} and {len(unknown)} in total)."
        )
    abstract: dict[Path, Any] = flatten_dict(models.abstract_params(config))
    found: dict[Path, jax.Array] = {}
    for name, path in names.items():
        shape = abstract[path].shape
        theirs = arrays.pop(name)
        array = convert(path, theirs, len(shape))
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} in our layout; got {array.shape}, converted from "
                f"{theirs.shape}."
            )
        found[path] = put(path, array)
    return unflatten_dict(found)
