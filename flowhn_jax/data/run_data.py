"""The data of a run: the prepared sets that it trains on, and those that it only validates on."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.set_names import SetLabel
from flowhn_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class NamedSet(SetLabel):
    """A prepared set of a run, with its label."""

    prepared: PreparedSet


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
        return cls((NamedSet("", 1.0, prepared),))

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
            for what, key, describe in _TRAITS:
                if getattr(other, key) != getattr(first, key):
                    raise ValueError(
                        "The sets of data.path and data.validation must have the same "
                        f"{what}; {first.folder} has {describe(first)}, but {other.folder} has "
                        f"{describe(other)}. Prepare {other.folder} again with the options of "
                        f"{first.folder}."
                    )


def _tokenizer(prepared: PreparedSet) -> str:
    """Return a set's tokenizer as text: where it came from, and its fingerprint."""
    return f"{prepared.tokenizer_spec} ({prepared.tokenizer_fingerprint[:12]})"


# What the sets of a run must have in common: its name, the attribute, and its description.
_TRAITS: tuple[tuple[str, str, Callable[[PreparedSet], Any]], ...] = (
    ("tokenizer", "tokenizer_fingerprint", _tokenizer),
    ("context", "context", lambda prepared: prepared.context),
    ("first token", "first_token", lambda prepared: prepared.first_token),
)
