"""The budget of a comparison: what each model may spend on its training, as a number of steps."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from flowhn_jax import flops
from flowhn_jax.compare.speed import Measurement
from flowhn_jax.config import Config
from flowhn_jax.utils.limits import MAX_INT
from flowhn_jax.utils.text import short_repr

KINDS = ("tokens", "flops", "seconds")
_MAX_AMOUNT = 1e30


class Budget(NamedTuple):
    """An amount that every model is trained for.

    Attributes:
      kind: 'tokens', 'flops' (of forward and backward, by `flops.train_flops`) or 'seconds' (of
        train steps, as measured on this device).
      amount: how many.
    """

    kind: str
    amount: float

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) < 1e15 else self.amount
        return f"{self.kind}:{amount}"

    def describe(self) -> str:
        """Return the budget in words, such as '2,000,000 tokens'."""
        names = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of train steps"}
        amount = f"{self.amount:,.0f}" if self.amount >= 100 else f"{self.amount:g}"
        return f"{amount if self.amount < 1e12 else f'{self.amount:g}'} {names[self.kind]}"


def parse_budget(text: str) -> Budget:
    """Return the budget in a text such as 'tokens:2e6', 'flops:1e15' or 'seconds:300'.

    Raises:
      ValueError: the text is not a budget.
    """
    kind, _, number = text.partition(":")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if kind not in KINDS or not 0 < amount <= _MAX_AMOUNT:
        forms = " or ".join(f"{each}:N" for each in KINDS)
        raise ValueError(
            f"--budget must be {forms}, with N above 0, e.g. tokens:2e6 or seconds:300; got "
            f"{short_repr(text)}."
        )
    return Budget(kind, amount)


def cost_per_step(kind: str, config: Config, seconds_per_step: float | None = None) -> float:
    """Return what a train step takes of a budget of this kind.

    Args:
      kind: the kind of the budget.
      config: the config of the run.
      seconds_per_step: as measured, for a budget of seconds.
    """
    context = config.model.context
    if kind == "seconds":
        assert seconds_per_step is not None
        return seconds_per_step
    if kind == "flops":
        return config.train.batch_size * flops.train_flops(config.model, context)
    return config.train.batch_size * context


def steps_for(budget: Budget, config: Config, seconds_per_step: float | None = None) -> int:
    """Return the fewest steps that spend the budget; see `cost_per_step`.

    Raises:
      ValueError: they are more than a run can have.
    """
    steps = budget.amount / cost_per_step(budget.kind, config, seconds_per_step)
    if steps > MAX_INT:
        raise ValueError(
            f"--budget must be at most {MAX_INT:,} steps; {budget} would be {steps:.3g} steps "
            f"of {config.model.name}."
        )
    return max(1, math.ceil(steps))


def seconds_per_step(measurements: Iterable[Measurement]) -> float:
    """Return the median over a model's rounds of the median seconds of its train steps."""
    return statistics.median(statistics.median(each["seconds"]["train"]) for each in measurements)
