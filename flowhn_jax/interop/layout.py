"""Parameters of PyTorch models in our layout, and back; by the path of ours."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.utils.text import short_repr

Path = tuple[str | int, ...]


def parse_path(text: str) -> Path:
    """'blocks/0/norm/scale' -> ('blocks', 0, 'norm', 'scale')."""
    return tuple(int(part) if part.isdecimal() else part for part in text.split("/"))


def to_ours(path: Path, array: np.ndarray, ndim: int) -> np.ndarray:
    """Theirs in ours: kernels [in, out], Mamba-1's in_proj [in, 2, out]; convolutions [taps, E]."""
    if path[-1] == "conv_weight" and array.ndim == 3:
        return array[:, 0, :].T
    if path[-1] == "kernel" and ndim == 3:  # u's channels, then z's
        return array.T.reshape(array.shape[-1], 2, -1)
    return array.T if path[-1] == "kernel" else array


def to_theirs(path: Path, array: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours`."""
    if path[-1] == "conv_weight":
        return array.T[:, None, :]
    return array.reshape(len(array), -1).T if path[-1] == "kernel" else array


def assemble(
    config: ModelConfig,
    arrays: Mapping[str, np.ndarray],
    names: Mapping[str, Path],
    convert: Callable[[Path, np.ndarray, int], np.ndarray] = to_ours,
) -> Params:
    """The parameters of a model from their arrays.

    Args:
      config: of the model.
      arrays: by their names.
      names: their name of each of our parameters -> its path.
      convert: from their layout to ours, by the path and ours' number of dimensions.

    Raises:
      ValueError: a name is missing or unknown, or a shape does not fit.
    """
    unknown, missing = sorted(set(arrays) - set(names)), sorted(set(names) - set(arrays))
    if unknown or missing:
        raise ValueError(
            f"The parameters do not fit {config.name} of {config.blocks} blocks: "
            f"missing {short_repr(missing[:3])}, unknown {short_repr(unknown[:3])} "
            f"({len(missing)} and {len(unknown)} in all)."
        )
    shapes = flatten_dict(models.abstract_params(config))
    found = {}
    for name, path in names.items():
        shape = shapes[path].shape
        array = convert(path, arrays[name], len(shape))
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}, in our layout {array.shape}; "
                f"accepted is {shape}."
            )
        found[path] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(found)
