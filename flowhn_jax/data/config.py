"""What the data of a run depends on."""

import dataclasses
from typing import Protocol

from flowhn_jax.storage import check_scheme, is_remote
from flowhn_jax.utils.checks import require

CACHE_AUTO, CACHE_OFF = "auto", "off"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: folder made by `python -m flowhn_jax.data.prepare`; '' for the embedded corpus.
      seed: seed of the global shuffle.
      cache: where each host keeps a copy of the shards: 'auto' is a folder of the user's cache for
        data in a bucket (gs://), and none for local data; 'off', or a local folder.
    """

    path: str = ""
    seed: int = 0
    cache: str = CACHE_AUTO

    def __post_init__(self):
        for name in ("path", "cache"):
            try:
                check_scheme(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"data.{name}: {error}") from error
        is_local = self.cache != "" and not is_remote(self.cache)
        require(is_local, "data.cache", "auto, off or a local folder", self.cache)
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
