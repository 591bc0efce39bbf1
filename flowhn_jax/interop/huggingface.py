"""Models as folders of safetensors and a config.json.

Llama, Mistral, Qwen2, Qwen3, Mamba, Falcon Mamba, Mamba-2, Jamba and Falcon-H1 have the names and
the layout of transformers. FlowHN, SHM and Hymba, which transformers does not know, bring their
code (`own_format`). No code that a file contains is ever run.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flowhn_jax.config import ModelConfig
from flowhn_jax.interop import own_format, state_spaces
from flowhn_jax.interop.families import FAMILIES, Family, to_config, to_json
from flowhn_jax.interop.layout import EMBEDDING, HEAD, Put, assemble, put_whole, to_theirs
from flowhn_jax.interop.torch_files import read_state_dict
from flowhn_jax.models import Params
from flowhn_jax.storage import AnyPath, Place, place, readable_place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.progress import Progress
from flowhn_jax.utils.text import short_list, short_repr

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
# Forms of weights, the preferred first: one file, or shards and the index that names them.
_FORMS = (
    (_WEIGHTS, "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_ADAPTER = "adapter_config.json"
_FREQUENCIES = "rotary_emb.inv_freq"  # of old files; they follow from config.json
# For a missing key, transformers uses the id of the family's first checkpoint.
_NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def load(folder: AnyPath, put: Put = put_whole) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters of a model saved by `save` or transformers.

    Args:
      folder: has config.json, and model.safetensors or pytorch_model.bin (needs torch), or the
        shards that model.safetensors.index.json or pytorch_model.bin.index.json names; local, gs://
        or hf://.
      put: makes the devices' arrays.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: a .bin file needs torch, which is not installed.
      ValueError: a file is damaged, or as in `from_state_dict`.
    """
    folder = readable_place(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The model must be a folder with {_CONFIG}; {str(folder)!r} is none."
        )
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"{str(folder / _ADAPTER)!r} is an adapter, which is not supported. Merge it into the "
            "model with peft's merge_and_unload() and save the result, or remove the file."
        )
    return from_state_dict(_read_arrays(folder), read_config(folder), put)


def read_config(folder: AnyPath) -> dict[str, Any]:
    """Return the folder's config.json.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold a JSON object.
    """
    return _read_json(readable_place(folder) / _CONFIG)


def config_of(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the config of the model that a config.json describes.

    Raises:
      ValueError: it has a value that is not supported.
    """
    is_own = hf_config.get("model_type") == own_format.MODEL_TYPE
    return own_format.from_json(hf_config) if is_own else to_config(hf_config)[1]


def from_state_dict(
    arrays: Mapping[str, Any], hf_config: Mapping[str, Any], put: Put = put_whole
) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters, in float32, for a state dict and its config.json.

    A model whose config.json ties the head to the embedding stays tied, unless the arrays hold a
    head with other values, as in transformers.

    Args:
      arrays: by name; in PyTorch's layout.
      hf_config: the content of config.json.
      put: makes the devices' arrays.

    Raises:
      ValueError: config.json has a value that is not supported, or a name or shape does not fit.
    """
    arrays = {
        name: np.asarray(array) for name, array in arrays.items() if not name.endswith(_FREQUENCIES)
    }
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{short_list([name])} must have a floating-point type; got {array.dtype}, as in a "
                "quantized model."
            )
    if hf_config.get("model_type") == own_format.MODEL_TYPE:
        return own_format.from_arrays(arrays, hf_config, put)
    if state_spaces.is_original(hf_config):
        arrays = state_spaces.to_hf_names(arrays)
        hf_config = state_spaces.to_hf_config(hf_config)
    family, config = to_config(hf_config)
    if config.tie_embeddings:
        config, arrays = _tied(family, config, arrays)
    return config, assemble(config, arrays, family.names(config), put=put)


def _tied(
    family: Family, config: ModelConfig, arrays: dict[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return a tied model's arrays without the head, or an untied config if the head differs."""
    untied = dataclasses.replace(config, tie_embeddings=False)
    theirs = {path: name for name, path in family.names(untied).items()}
    embedding, head = theirs[EMBEDDING], theirs[HEAD]
    if head not in arrays:
        return config, arrays
    others = {name: array for name, array in arrays.items() if name != head}
    table = others.setdefault(embedding, arrays[head])
    return (config, others) if np.array_equal(table, arrays[head]) else (untied, arrays)


def save(
    folder: AnyPath,
    config: ModelConfig,
    params: Params,
    keys: Mapping[str, Any] = _NO_IDS,
) -> None:
    """Write config.json, model.safetensors in float32 and, where needed, the PyTorch code.

    Args:
      folder: is created if it does not exist.
      config: the model's config.
      params: the model's parameters.
      keys: further keys of config.json, such as the ids of special tokens.

    Raises:
      ValueError: the folder is a file, or the model has a size that its class in transformers does
        not support.
    """
    folder = place(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The model must be saved to a folder; {str(folder)!r} is a file.")
    ours = flatten_dict(params)
    if config.kind in {family.kind for family in FAMILIES.values()}:
        family, hf_config = to_json(config)
        names = family.names(config)
    else:
        hf_config, names = own_format.to_json(config), own_format.names(config)
    arrays = {name: to_theirs(path, np.asarray(ours[path])) for name, path in names.items()}
    folder.make_folder()
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    with (folder / _WEIGHTS).writing() as temporary:
        save_file(arrays, temporary, metadata={"format": "pt"})
    if "auto_map" in hf_config:
        (folder / own_format.CODE).write_whole(own_format.code())
    (folder / _CONFIG).write_whole(json.dumps({**hf_config, **keys}, indent=2) + "\n")


def _read_json(path: Place) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {str(path.parent)!r}.")
    found = json_text.loads(path.read(), repr(str(path)))
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold an object; got {short_repr(found)}.")
    return found


def _read_arrays(folder: Place) -> dict[str, np.ndarray]:
    """Return all tensors in the folder's weights."""
    arrays: dict[str, np.ndarray] = {}
    for name in _weight_files(folder):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"There is no {name} in {str(folder)!r}.")
        with path.fetched() as local:
            if name.endswith(".safetensors"):
                arrays |= _read_safetensors(path, local)
            else:
                arrays |= read_state_dict(str(local))
    return arrays


def _weight_files(folder: Place) -> list[str]:
    """Return the names of the folder's weights: the first form of `_FORMS` that it has."""
    for whole, index in _FORMS:
        if (folder / whole).is_file():
            return [whole]
        if (folder / index).is_file():
            by_tensor = _read_json(folder / index).get("weight_map")
            if not isinstance(by_tensor, dict):
                raise ValueError(f"{str(folder / index)!r} must have a weight_map.")
            names = sorted(set(map(str, by_tensor.values())))
            ending = pathlib.PurePath(whole).suffix
            for name in names:
                if pathlib.PurePath(name).name != name or not name.endswith(ending):
                    raise ValueError(
                        f"{index} must name {ending} files in its own folder; got "
                        f"{short_repr(name)}."
                    )
            return names
    return [_FORMS[0][0]]


def _read_safetensors(path: Place, local: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, of which `local` is a copy."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(local, framework="flax") as file:
            tensors = list(file.keys())
        for tensor in Progress(tensors, f"reading {path.name}", "tensors"):
            # A file keeps in memory what was read from it, until it is closed. Flax's arrays, as
            # NumPy has no bfloat16.
            with safe_open(local, framework="flax") as file:
                arrays[tensor] = np.asarray(file.get_tensor(tensor))
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} must be a complete safetensors file: {error}.") from error
    return arrays
