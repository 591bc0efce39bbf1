"""What the data of a run depends on."""

import dataclasses
from typing import Protocol

from flowhn_jax.utils.checks import require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: folder made by `python -m flowhn_jax.data.prepare`; '' for the embedded corpus.
      seed: seed of the global shuffle.
    """

    path: str = ""
    seed: int = 0

    def __post_init__(self):
        require(self.seed >= 0, "data.seed", "0 or more", self.seed)


class ModelSizes(Protocol):
    """The sizes of a model that its data must fit."""

    @property
    def context(self) -> int:
        """Tokens of a window."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...


class RunConfig(Protocol):
    """A run's config (`flowhn_jax.config.Config`), as far as it concerns the data."""

    @property
    def data(self) -> DataConfig:
        """What to train on."""
        ...

    @property
    def model(self) -> ModelSizes:
        """The sizes that the data must fit."""
        ...
