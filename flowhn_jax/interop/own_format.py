"""FlowHN, SHM and Hymba, which transformers does not know, as models with their own code.

config.json has model_type 'flowhn_jax', the keys of our model config, and the plan of the split.
`modeling_flowhn.py` next to it is the model in PyTorch, which transformers loads with
`trust_remote_code=True`. Parameters are named by our paths ('blocks.0.norm.weight') and have
PyTorch's layout.
"""

import importlib.resources
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.config import FlowHNConfig, ModelConfig
from flowhn_jax.interop.layout import Path, Put, assemble, put_whole
from flowhn_jax.models import Params
from flowhn_jax.split import LearnedBlockPlan

MODEL_TYPE = "flowhn_jax"
CODE = "modeling_flowhn.py"
_AUTO_MAP = {
    "AutoConfig": "modeling_flowhn.FlowHNConfig",
    "AutoModelForCausalLM": "modeling_flowhn.FlowHNForCausalLM",
}
# PyTorch calls these parameters of its modules `weight`.
_WEIGHTS = ("kernel", "embedding", "scale")


def code() -> str:
    """Return the text of the PyTorch code."""
    return importlib.resources.files("flowhn_jax.interop").joinpath(CODE).read_text()


def names(config: ModelConfig) -> dict[str, Path]:
    """Return the path of each of our parameters, by its name in the PyTorch model."""
    return {_name(path): path for path in flatten_dict(models.abstract_params(config))}


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json.

    A model that is planned for each length separately (`split.scope='sequence'`) cannot decode and
    has no PyTorch code: its folder is for `from_arrays` alone.
    """
    found = {
        "model_type": MODEL_TYPE,
        "model": config_lib.to_dict(config),
        "tie_word_embeddings": config.tie_embeddings,
    }
    if not config.can_decode:
        return found
    found |= {"architectures": ["FlowHNForCausalLM"], "auto_map": _AUTO_MAP, "dtype": "float32"}
    if isinstance(config, FlowHNConfig):
        found |= {"plan": _plan(config), "max_length_of_plan": config.max_length}
    return found


def from_json(hf_config: Mapping[str, Any]) -> ModelConfig:
    """Return the config in the content of config.json; raise ValueError if a key is invalid."""
    return config_lib.parse({"model": hf_config.get("model")}).model


def from_arrays(
    arrays: dict[str, np.ndarray], hf_config: Mapping[str, Any], put: Put = put_whole
) -> tuple[ModelConfig, Params]:
    """Return the config and the parameters of a saved model; `arrays` is emptied.

    Raises:
      ValueError: config.json has an invalid key, or a name or shape does not fit.
    """
    config = from_json(hf_config)
    if _has_old_names(arrays):
        paths = flatten_dict(models.abstract_params(config))
        old = {".".join(map(str, path)): path for path in paths}
        return config, assemble(config, arrays, old, lambda path, array, ndim: array, put)
    return config, assemble(config, arrays, names(config), put=put)


def _has_old_names(found: Iterable[str]) -> bool:
    """Return whether the arrays have our names and layout, as in exports of version 0.1.0."""
    return any(name.endswith(".kernel") for name in found)


def _name(path: Path) -> str:
    last = "weight" if path[-1] in _WEIGHTS else path[-1]
    return ".".join(map(str, (*path[:-1], last)))


def _plan(config: FlowHNConfig) -> list[dict[str, Any] | None]:
    """Return attention's positions in each block; None where both branches see all.

    For a learned split that is the width of its quota.
    """
    found: list[dict[str, Any] | None] = []
    for block in config.plan().blocks:
        period = {"period": block.attention.period}
        if isinstance(block, LearnedBlockPlan):
            found.append(period | {"width": block.attention.width})
        elif block.is_split:
            found.append(period | {"runs": [list(run) for run in block.attention.runs]})
        else:
            found.append(None)
    return found
