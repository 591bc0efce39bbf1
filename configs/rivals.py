"""How the recipe of a rival is made of FlowHN's at the same size: same data, tokens, optimizer."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from flowhn_jax import config as config_lib


def get_config(
    flowhn: ml_collections.ConfigDict, kind: str, sizes: Mapping[str, Mapping[str, Any]]
) -> ml_collections.ConfigDict:
    """FlowHN's recipe with the model of `kind`: `sizes` has what differs, by kind."""
    if kind not in sizes:
        raise ValueError(f"the model is {kind!r}; accepted are {', '.join(sizes)}")
    default = config_lib.default().model
    config = flowhn.copy_and_resolve_references()
    for key in config.model:
        if not config_lib.reads(kind, key):
            config.model[key] = default[key]
    config.model.kind = kind
    config.model.update(sizes[kind])
    return config
