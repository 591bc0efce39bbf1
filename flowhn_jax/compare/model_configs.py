"""The configs of the compared models: FlowHN's strategies and the baselines at one size."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.compare.matching import match_flops
from flowhn_jax.config import BASELINES, Config
from flowhn_jax.utils.name_lists import parse_name_list
from flowhn_jax.utils.text import short_repr

SIZES = ("tiny", "135m", "350m", "1b")
NAMES = (*recipes.VARIANTS, *BASELINES)
MATCHES = ("params", "flops")
REFERENCE = "fac_split"  # whose FLOPs the baselines match with match='flops'


def parse_names(models: str) -> tuple[str, ...]:
    """Return the model names in `models`: 'all', or names separated by commas.

    Raises:
      ValueError: a name is unknown or given twice.
    """
    return parse_name_list("models", models, NAMES, every="all")


def model_config(
    size: str,
    name: str,
    context: int | None = None,
    batch_size: int | None = None,
    match: str = MATCHES[0],
) -> Config:
    """Return the config of one compared model.

    It is the model's recipe, except that it validates on the whole validation set.

    Args:
      size: one of SIZES.
      name: one of NAMES.
      context: replaces the recipe's context.
      batch_size: replaces the recipe's batch size.
      match: how a baseline's size is chosen: 'params' keeps the recipe's; 'flops' matches the FLOPs
        per token of FlowHN's fac_split, see `matching.match_flops`.

    Raises:
      ValueError: the size is unknown, or `config.parse` refuses the result.
    """
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}; got {short_repr(size)}.")
    family = "baseline" if name in BASELINES else "flowhn"
    values: dict[str, Any] = recipes.load(f"{family}_{size}", name).to_dict()
    model, train = values["model"], values["train"]
    if context is not None:
        model["context"] = context
    if batch_size is not None:
        train["batch_size"] = batch_size
    train["eval_windows"] = 0
    config = config_lib.parse(values)
    if match == "flops" and name in BASELINES:
        reference = model_config(size, REFERENCE, context).model
        config = dataclasses.replace(config, model=match_flops(config.model, reference))
    return config


def model_configs(
    size: str,
    names: Sequence[str],
    context: int | None = None,
    batch_size: int | None = None,
    match: str = MATCHES[0],
) -> dict[str, Config]:
    """Return the configs of several compared models by name; see `model_config`."""
    return {name: model_config(size, name, context, batch_size, match) for name in names}
