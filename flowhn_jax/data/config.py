"""What the data of a run depends on."""

import dataclasses
from typing import Protocol

from flowhn_jax.data.set_names import SetName, check_names, training_sets, validation_sets
from flowhn_jax.storage import check_scheme, is_remote
from flowhn_jax.utils.checks import require

CACHE_AUTO, CACHE_OFF = "auto", "off"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: folder made by `python -m flowhn_jax.data.prepare`; '' for the embedded corpus. Several
        are mixed by PATH:WEIGHT,PATH:WEIGHT,..., each optionally as NAME=PATH:WEIGHT; by default
        a set has the name of its folder.
      validation: further sets to validate on, as PATH,PATH,... or NAME=PATH,NAME=PATH,...
      seed: seed of the global shuffle.
      cache: where each host copies the shards: 'auto' (the user's cache for gs://, no copy for
        local data), 'off' (no copy), or a local folder.
    """

    path: str = ""
    validation: str = ""
    seed: int = 0
    cache: str = CACHE_AUTO

    def __post_init__(self):
        check_names(self.training_sets + self.validation_sets)
        try:
            check_scheme(self.cache)
        except ValueError as error:
            raise ValueError(f"data.cache: {error}") from error
        is_local = self.cache != "" and not is_remote(self.cache)
        require(is_local, "data.cache", "auto, off or a local folder", self.cache)
        require(self.seed >= 0, "data.seed", "0 or more", self.seed)

    @property
    def training_sets(self) -> tuple[SetName, ...]:
        """The sets of `path`; none for the embedded corpus."""
        return training_sets(self.path)

    @property
    def validation_sets(self) -> tuple[SetName, ...]:
        """The sets of `validation`."""
        return validation_sets(self.validation)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sets that have a validation loss of their own."""
        return tuple(each.name for each in self.training_sets + self.validation_sets if each.name)


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
