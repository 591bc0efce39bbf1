"""Models as folders of safetensors and a config.json, in Hugging Face's layout where it has one.

Llama, Mamba, Mamba-2, Jamba and Falcon-H1 are written as transformers writes them. FlowHN, SHM and
Hymba, which it does not know, have our own parameters' paths for names ('blocks.0.norm.scale'), and
a config.json of model_type 'flowhn_jax' with our model's keys. No file is ever unpickled.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.interop.families import FAMILIES, to_config, to_json
from flowhn_jax.interop.layout import Path, assemble, to_theirs
from flowhn_jax.models import Params
from flowhn_jax.utils import json_text
from flowhn_jax.utils.files import whole_file
from flowhn_jax.utils.text import short_list, short_repr

_OURS = "flowhn_jax"
_CONFIG, _INDEX, _WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
_ADAPTER = "adapter_config.json"
_HEAD = "lm_head.weight"
# Without a key transformers takes the id of the family's first checkpoint.
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def load(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a model that `save`, or transformers, has written; from one file or several shards.

    Args:
      folder: with config.json and model.safetensors, or the shards that
        model.safetensors.index.json names.

    Returns:
      (config, params) as `models.forward` takes them.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or as of `from_state_dict`.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder; accepted is one with {_CONFIG}.")
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"{str(folder / _ADAPTER)!r} changes the model's weights, which this code does not do. "
            "Save the folder again with peft's merge_and_unload(), or remove it if it is not meant."
        )
    return from_state_dict(_read_arrays(folder), read_config(folder))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it holds no JSON object.
    """
    return _read_json(pathlib.Path(folder) / _CONFIG)


def from_state_dict(
    arrays: Mapping[str, Any], hf_config: Mapping[str, Any]
) -> tuple[ModelConfig, Params]:
    """A model from its arrays by name and its config.json; a tied head becomes one of its own.

    Hugging Face's arrays are [out, in], those of model_type 'flowhn_jax' in our layout.

    Returns:
      (config, params) as `models.forward` takes them, float32.

    Raises:
      ValueError: what config.json asks for is not ours, or a name or shape does not fit; the
        message names them.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{short_list([name])} is of type {array.dtype}, as in a quantized model; accepted are "
                "floating-point numbers."
            )
    if hf_config.get("model_type") == _OURS:
        config = config_lib.parse({"model": hf_config.get("model")}).model
        names = {_own_name(path): path for path in flatten_dict(models.abstract_params(config))}
        return config, assemble(config, arrays, names, lambda path, array, ndim: array)
    family, config = to_config(hf_config)
    names = family.names(config)
    if hf_config.get("tie_word_embeddings", family.is_tied) and _HEAD not in arrays:
        embedding = next(theirs for theirs, path in names.items() if path[-1] == "embedding")
        arrays |= {_HEAD: arrays[embedding]} if embedding in arrays else {}
    return config, assemble(config, arrays, names)


def save(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    keys: Mapping[str, Any] = _NO_IDS,
) -> None:
    """Writes config.json and model.safetensors, in float32; `load` gives the same logits.

    Args:
      folder: is made where it is absent.
      config: of the model.
      params: of the model.
      keys: of config.json besides the model's, such as the ids of special tokens.

    Raises:
      ValueError: the folder is a file, or the model is one of transformers' but for a size that it
        cannot have.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; accepted is a folder.")
    ours = flatten_dict(params)
    if config.kind in {family.kind for family in FAMILIES.values()}:
        family, hf_config = to_json(config)
        arrays = {n: to_theirs(p, np.asarray(ours[p])) for n, p in family.names(config).items()}
    else:
        hf_config = {"model_type": _OURS, "model": config_lib.to_dict(config)}
        arrays = {_own_name(path): np.asarray(array) for path, array in ours.items()}
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    with whole_file(folder / _WEIGHTS) as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})
    with whole_file(folder / _CONFIG) as temporary:
        temporary.write_text(json.dumps({**hf_config, **keys}, indent=2) + "\n")


def _own_name(path: Path) -> str:
    return ".".join(map(str, path))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {str(path.parent)!r}.")
    found = json_text.loads(path.read_bytes(), repr(str(path)))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds {short_repr(found)}; accepted is an object.")
    return found


def _read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of the folder; of the one file where there are shards too."""
    files = [_WEIGHTS]
    if (folder / _INDEX).is_file() and not (folder / _WEIGHTS).is_file():
        by_tensor = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(by_tensor, dict):
            raise ValueError(f"{str(folder / _INDEX)!r} has no weight_map.")
        files = sorted(set(map(str, by_tensor.values())))
    arrays: dict[str, np.ndarray] = {}
    for name in files:
        if pathlib.PurePath(name).name != name:
            raise ValueError(
                f"{_INDEX} names {short_repr(name)}; accepted are files of its own folder."
            )
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"There is no {name} in {str(folder)!r}.")
        try:
            with safe_open(path, framework="flax") as file:  # NumPy's has no bfloat16
                for tensor in file.keys():  # noqa: SIM118  it cannot be iterated itself
                    arrays[tensor] = np.asarray(file.get_tensor(tensor))
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}.") from error
    return arrays
