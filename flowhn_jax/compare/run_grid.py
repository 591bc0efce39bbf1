"""The training runs of a comparison: each model with every learning rate and seed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowhn_jax.config import Config
from flowhn_jax.utils.text import short_repr

_LOGGED_ROWS = 100  # per run
_CHECKPOINTS = 10  # per run


class Run(NamedTuple):
    """A training run.

    Attributes:
      name: its folder, such as 'llama' or 'llama_learning_rate=0.001_seed=1': the model, and
        what differs from its recipe's rate and seed 0.
      model: name of the model.
      learning_rate: peak of the schedule.
      seed: the seed of the parameters and of the order of the data.
    """

    name: str
    model: str
    learning_rate: float
    seed: int


def parse_rates(texts: Sequence[str]) -> tuple[float, ...]:
    """Return the learning rates of --rates.

    Raises:
      ValueError: one is not a number above 0, or there twice.
    """
    try:
        rates = tuple(map(float, texts))
    except ValueError:
        rates = (math.nan,)
    if not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(
            "--rates must be different numbers above 0, separated by commas, e.g. 1e-3,3e-3; got "
            f"{short_repr(','.join(texts))}."
        )
    return rates


def run_grid(configs: Mapping[str, Config], rates: Sequence[float], seeds: int) -> list[Run]:
    """Return the runs: all of one seed before the next seed.

    Args:
      configs: the configs of the models, by name.
      rates: learning rates that each model is trained with; none: that of its recipe.
      seeds: how many seeds, from 0.
    """
    found = []
    for seed in range(seeds):
        for name, config in configs.items():
            usual = config.train.learning_rate
            for rate in rates or (usual,):
                parts = [name]
                parts += [f"learning_rate={rate}"] if rate != usual else []
                parts += [f"seed={seed}"] if seed else []
                found.append(Run("_".join(parts), name, rate, seed))
    return found


def run_config(config: Config, run: Run, steps: int, path: str) -> Config:
    """Return the config of a run, whose schedule ends at `steps`, where it validates.

    Args:
      config: the config of its model.
      run: the run.
      steps: the number of the run's steps.
      path: what it is trained on, as `data.path`.
    """
    train = dataclasses.replace(
        config.train,
        steps=steps,
        learning_rate=run.learning_rate,
        seed=run.seed,
        log_every=max(1, steps // _LOGGED_ROWS),
        eval_every=steps,
        checkpoint_every=max(1, steps // _CHECKPOINTS),
    )
    data = dataclasses.replace(config.data, path=path, seed=run.seed)
    return dataclasses.replace(config, train=train, data=data)
