"""Who is compared: FlowHN's strategies and the baselines at one size, each with its recipe."""

import dataclasses
from collections.abc import Sequence

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.config import BASELINES, Config
from flowhn_jax.split import STRATEGIES
from flowhn_jax.utils.text import short_repr

SIZES = ("tiny", "135m", "350m", "1b")
NAMES = STRATEGIES + BASELINES
_ROWS_OF_METRICS, _CHECKPOINTS = 20, 10


def parse_names(models: str) -> tuple[str, ...]:
    """'all', or names with commas between them.

    Raises:
      ValueError: a name that is unknown, or there twice.
    """
    if models == "all":
        return NAMES
    names = tuple(name.strip() for name in models.split(","))
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"--models has {short_repr(name)}; accepted are all, or of {', '.join(NAMES)}."
            )
    if len(set(names)) < len(names):
        raise ValueError(f"--models is {short_repr(models)}; accepted is each name once.")
    return names


def candidate(
    size: str, name: str, train_tokens: int, context: int | None, batch_size: int | None
) -> Config:
    """The recipe of one model, with the steps that make `train_tokens` or a little more.

    Args:
      size: one of SIZES.
      name: one of NAMES.
      train_tokens: 0: none, the recipe's own steps are left.
      context, batch_size: in place of the recipe's; None: the recipe's.

    Raises:
      ValueError: an unknown size, or what `config.parse` refuses.
    """
    if size not in SIZES:
        raise ValueError(f"--size is {short_repr(size)}; accepted are {', '.join(SIZES)}.")
    family = "baseline" if name in BASELINES else "flowhn"
    recipe = recipes.load(f"{family}_{size}", name)
    if context is not None:
        recipe.model.context = context
    if batch_size is not None:
        recipe.train.batch_size = batch_size
    train = recipe.train
    if train_tokens:
        train.steps = -(-train_tokens // (train.batch_size * recipe.model.context))
    train.log_every = max(1, train.steps // _ROWS_OF_METRICS)
    train.eval_every = train.steps  # once, behind the last step, and all of the validation set
    train.eval_windows = 0
    train.checkpoint_every = max(1, train.steps // _CHECKPOINTS)
    return config_lib.parse(recipe)


def candidates(
    size: str,
    names: Sequence[str],
    train_tokens: int = 0,
    context: int | None = None,
    batch_size: int | None = None,
) -> dict[str, Config]:
    """Recipes by name, as `candidate` makes them."""
    return {name: candidate(size, name, train_tokens, context, batch_size) for name in names}


def on_data(config: Config, folder: str) -> Config:
    """The recipe that reads the prepared set in `folder`."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=folder))
