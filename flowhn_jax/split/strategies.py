"""The split strategies: which positions attention gets in each block.

| strategy | block b of a context of N positions, a of them attention's                          |
|----------|-------------------------------------------------------------------------------------|
| no_split | both branches see all N                                                             |
| ae_split | alternating equal halves: even b SSM first half, attention second; odd b swapped    |
| fa_split | FLOP-aware: SSM the first N - a, attention the last a, in every block               |
| fac_split| FLOP-aware circulating: attention's window starts at the end and moves back by a    |
| fai_split| FLOP-aware interleaved: a run of r in every period of m, moving back by `shift`     |
| learned_split | r tokens of every window of m, by a learned score (`split.routing`)            |

The first four are the paper's (arXiv 2505.19472, section 3). Two more, in `PARITY_STRATEGIES`,
reproduce the authors' code where it departs from the paper, for parity with its checkpoints.

A new strategy is one class in this file: derive it from `Strategy`, name it, decorate it with
`register`. All other code asks the class for its properties and knows no names.
"""

import abc
import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar

from flowhn_jax.split.selection import EVERYTHING, Quota, Selection, circular_window

if TYPE_CHECKING:
    from flowhn_jax.split.config import SplitConfig

_REFERENCE_ATTENTION_SHARE = 0.59  # a constant of the authors' code


@dataclasses.dataclass(frozen=True)
class Strategy(abc.ABC):
    """A strategy for one context. The SSM gets the positions that attention does not get.

    Attributes:
      name: the value of `model.split.strategy` that selects it.
      is_split: whether its blocks divide the positions between the branches; if not, both branches
        see all of them and `selection` is not called.
      uses_balance: whether it reads `tokens`.
      is_bounded: whether its selections are made for `length` positions and end there; if not, a
        model takes sequences of any length.
      is_learned: whether the model chooses the positions from the text: `selection` then returns a
        `Quota`, the number of them.
      needs_sequence_scope: whether it is for parity only and requires `split.scope='sequence'`.
      split: the user's choices.
      length: N, the positions to plan for.
      tokens: attention's tokens of `length` by `split.balance`, before any rounding; 0 unless
        `uses_balance`.
    """

    name: ClassVar[str]
    is_split: ClassVar[bool] = True
    uses_balance: ClassVar[bool] = True
    is_bounded: ClassVar[bool] = True
    is_learned: ClassVar[bool] = False
    needs_sequence_scope: ClassVar[bool] = False

    split: "SplitConfig"
    length: int
    tokens: int

    @abc.abstractmethod
    def selection(self, block: int) -> Selection | Quota:
        """Return attention's positions in a block, counted from the first block after the stem."""

    def tokens_per_period(self) -> int:
        """Return `tokens` as a number of tokens in every `split.period`: both branches get some."""
        period = self.split.period
        return min(max(round(self.tokens / self.length * period), 1), period - 1)

    def aligned_tokens(self, excluded: Collection[float] = ()) -> int:
        """Return `tokens` rounded to a multiple of `split.align` that leaves both branches some.

        A length too short for a multiple is not aligned.

        Args:
          excluded: numbers of tokens that must not result; the next nearest multiple is taken.
        """
        align = 1 if self.split.balance == "equal" else self.split.align
        for step in (align, 1):
            multiples = set(range(step, self.length, step)).difference(excluded)
            if multiples:
                return min(multiples, key=lambda multiple: (abs(multiple - self.tokens), multiple))
        return self.tokens


STRATEGIES: dict[str, type[Strategy]] = {}  # by name, those for training
PARITY_STRATEGIES: dict[str, type[Strategy]] = {}  # by name, those with `needs_sequence_scope`


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available as `model.split.strategy`; for use as a class decorator.

    Raises:
      ValueError: another strategy has the same name.
    """
    if strategy.name in STRATEGIES or strategy.name in PARITY_STRATEGIES:
        raise ValueError(f"The split strategy {strategy.name!r} is registered already.")
    registry = PARITY_STRATEGIES if strategy.needs_sequence_scope else STRATEGIES
    registry[strategy.name] = strategy
    return strategy


def get_strategy(name: str) -> type[Strategy]:
    """Return the registered strategy of a name.

    Raises:
      ValueError: no strategy has the name; the message lists all.
    """
    known = STRATEGIES | PARITY_STRATEGIES
    if name not in known:
        raise ValueError(
            f"model.split.strategy must be one of {', '.join(known)}; got {name!r:.80}."
        )
    return known[name]


@register
class NoSplit(Strategy):
    """Both branches see all positions."""

    name = "no_split"
    is_split = False
    uses_balance = False
    is_bounded = False

    def selection(self, block: int) -> Selection:
        """Return all positions."""
        return EVERYTHING


@register
class AlternatingEqualSplit(Strategy):
    """Halves, swapped from block to block; attention has the second half in even blocks."""

    name = "ae_split"
    uses_balance = False

    def selection(self, block: int) -> Selection:
        """Return one half of the positions."""
        first_half = self.length // 2
        if block % 2:
            return circular_window(0, first_half, self.length)
        return circular_window(first_half, self.length - first_half, self.length)


@register
class FlopAwareSplit(Strategy):
    """The last positions, in every block."""

    name = "fa_split"

    def selection(self, block: int) -> Selection:
        """Return the last positions."""
        tokens = self.aligned_tokens()
        return circular_window(self.length - tokens, tokens, self.length)


@register
class FlopAwareCirculatingSplit(Strategy):
    """A window that starts at the end and moves back by its own width from block to block."""

    name = "fac_split"

    def selection(self, block: int) -> Selection:
        """Return the window of a block."""
        # A window of one half only swaps the halves: rounding must not lead there unasked.
        asked_for_half = self.split.balance in ("equal", 0.5)
        tokens = self.aligned_tokens(excluded=() if asked_for_half else (self.length / 2,))
        return circular_window(self.length - (block + 1) * tokens, tokens, self.length)


@register
class FlopAwareInterleavedSplit(Strategy):
    """A run in every period, which moves back by `split.shift` from block to block."""

    name = "fai_split"
    is_bounded = False

    def selection(self, block: int) -> Selection:
        """Return the runs of a block."""
        period, run = self.split.period, self.tokens_per_period()
        shift = max(1, run // 2) if self.split.shift is None else self.split.shift
        return circular_window(period - run - block * shift, run, period)


@register
class LearnedSplit(Strategy):
    """The same number of tokens of every window of `split.period`, by a score learned per block."""

    name = "learned_split"
    is_bounded = False
    is_learned = True

    def selection(self, block: int) -> Quota:
        """Return the number of tokens per window, which is the same in all blocks."""
        return Quota(self.split.period, self.tokens_per_period())


class ParityStrategy(Strategy):
    """A strategy of the authors' code, for parity with its checkpoints."""

    uses_balance = False
    needs_sequence_scope = True


@register
class ReferenceFlopAwareSplit(ParityStrategy):
    """The authors' FA_Split: the first 59 % of the positions, in every block."""

    name = "fa_split_reference"

    def selection(self, block: int) -> Selection:
        """Return the first positions."""
        return circular_window(0, math.floor(_REFERENCE_ATTENTION_SHARE * self.length), self.length)


@register
class ReferenceAlternatingSplit(ParityStrategy):
    """The authors' FAC_Split: halves as in `ae_split`, but attention never has the odd token."""

    name = "alternating_reference"

    def selection(self, block: int) -> Selection:
        """Return one half of the positions, rounded down."""
        half = self.length // 2
        return circular_window(0 if block % 2 else self.length - half, half, self.length)
