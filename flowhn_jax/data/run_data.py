"""The data of a run: the prepared sets that it trains on, and those that it only validates on."""

import dataclasses
from typing import Any

from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class NamedSet:
    """A prepared set of a run.

    Attributes:
      name: for metrics; '' for the only set that a run trains on.
      prepared: the set.
      weight: its share of the training windows; 0 for a set that is only validated.
    """

    name: str
    prepared: PreparedSet
    weight: float


@dataclasses.dataclass(frozen=True)
class RunData:
    """The prepared sets of a run, which share tokenizer, context and first token.

    Attributes:
      training: the sets to train on, in the order of `data.path`; their weights sum to 1.
      validation: the sets of `data.validation`.
    """

    training: tuple[NamedSet, ...]
    validation: tuple[NamedSet, ...] = ()

    @classmethod
    def of(cls, prepared: PreparedSet) -> "RunData":
        """Return the data of a run that trains on one set."""
        return cls((NamedSet("", prepared, 1.0),))

    @property
    def is_mixture(self) -> bool:
        """Whether the run trains on several sets."""
        return len(self.training) > 1

    @property
    def main(self) -> PreparedSet:
        """The training set with the largest weight."""
        return max(self.training, key=lambda each: each.weight).prepared

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sets."""
        return self.main.tokenizer

    @property
    def named(self) -> dict[str, PreparedSet]:
        """The sets that have results of their own, by name."""
        sets = (self.training if self.is_mixture else ()) + self.validation
        return {each.name: each.prepared for each in sets}

    def load(self) -> None:
        """Copy the shards that the run reads to this host's cache, if it has one.

        Raises:
          ValueError, OSError: see `shard_cache.load`.
        """
        for each in self.training:
            each.prepared.load("train", "validation")
        for each in self.validation:
            each.prepared.load("validation")

    def check(self) -> None:
        """Check that the sets may be mixed.

        Raises:
          ValueError: a set differs from the first one.
        """
        first, *others = (each.prepared for each in self.training + self.validation)
        for other in others:
            for what, found, expected in _traits(other, first):
                if found != expected:
                    raise ValueError(
                        "The sets of data.path and data.validation must have the same "
                        f"{what}; {first.folder} has {expected}, but {other.folder} has {found}. "
                        f"Prepare {other.folder} again with the options of {first.folder}."
                    )


def _traits(one: PreparedSet, other: PreparedSet) -> list[tuple[str, Any, Any]]:
    """Return what two sets of a run must have in common, with the values of both."""
    return [
        ("tokenizer", _tokenizer(one), _tokenizer(other)),
        ("context", one.context, other.context),
        ("first token", one.first_token, other.first_token),
    ]


def _tokenizer(prepared: PreparedSet) -> str:
    """Return the specification of a set's tokenizer, and its fingerprint, which covers all."""
    return f"{prepared.tokenizer_spec} ({prepared.tokenizer_fingerprint[:12]})"
