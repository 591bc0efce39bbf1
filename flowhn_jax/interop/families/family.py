"""What a model family of transformers needs to be read and written."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.interop.layout import Path, parse_path

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      kind: our model.kind.
      architecture: the class in transformers.
      model: our path of each of transformers' parameter names, outside the layers.
      layer: returns the same for the names within layer i, also of parameters that only some
        configs have.
      read: returns keys of our model config, from config.json.
      write: returns keys of config.json, from our config.
      supported: the values that we support of a key of config.json, where there are others. None:
        `read` checks the key, or transformers ignores it.
      can_write: returns whether a config of our kind is written as this family.
      layers: prefix of transformers' names within layers.
      is_tied: whether the head is the embedding if config.json has no tie_word_embeddings.
    """

    kind: str
    architecture: str
    model: Mapping[str, str]
    layer: Callable[[Any, int], Mapping[str, str]]
    read: Callable[[Json], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    supported: Mapping[str, tuple[Any, ...] | None]
    can_write: Callable[[Any], bool] = lambda config: True
    layers: str = "model.layers"
    is_tied: bool = False

    def names(self, config: ModelConfig) -> dict[str, Path]:
        """Return the path of each of our parameters, by their name."""
        found = dict(self.model)
        for index in range(config.blocks):
            for theirs, ours in self.layer(config, index).items():
                found[f"{self.layers}.{index}.{theirs}"] = f"blocks/{index}/{ours}"
        paths = {theirs: parse_path(ours) for theirs, ours in found.items()}
        existing = flatten_dict(models.abstract_params(config))
        return {theirs: path for theirs, path in paths.items() if path in existing}
