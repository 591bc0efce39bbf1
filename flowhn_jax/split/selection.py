"""Selections: periodic sets of token positions, and quotas, of which only the size is known."""

import dataclasses
import itertools

Run = tuple[int, int]  # [start, stop)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The positions p with p mod `period` in one of `runs`.

    Attributes:
      period: the length after which the selection repeats.
      runs: half-open ranges [start, stop) within one period, in ascending order, disjoint and not
        adjacent.
    """

    period: int
    runs: tuple[Run, ...]

    def count(self, length: int) -> int:
        """Return the number of selected positions below `length`."""
        periods, tail = divmod(length, self.period)
        in_tail = sum(max(0, min(stop, tail) - start) for start, stop in self.runs)
        return periods * self.width + in_tail

    @property
    def width(self) -> int:
        """Number of selected positions in one whole period."""
        return sum(stop - start for start, stop in self.runs)

    def positions(self, length: int) -> tuple[int, ...]:
        """Return the selected positions below `length`, ascending."""
        starts = range(0, length, self.period)
        runs = ((base + start, base + stop) for base in starts for start, stop in self.runs)
        return tuple(p for start, stop in runs for p in range(start, min(stop, length)))

    def contains(self, position: int) -> bool:
        """Return whether `position` is selected."""
        return any(start <= position % self.period < stop for start, stop in self.runs)

    def complement(self) -> "Selection":
        """Return the selection of all other positions."""
        edges = [0, *itertools.chain.from_iterable(self.runs), self.period]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return Selection(self.period, tuple((start, stop) for start, stop in gaps if start < stop))


@dataclasses.dataclass(frozen=True)
class Quota:
    """`width` positions of every window of `period`, which a model chooses from the text.

    The windows are [0, period), [period, 2 * period) and so on (`split.routing`).
    """

    period: int
    width: int

    def count(self, length: int) -> int:
        """Return the most positions below `length` that can be chosen; in whole windows, all are.

        A model has room for as many.
        """
        windows, tail = divmod(length, self.period)
        return windows * self.width + min(self.width, tail)

    def complement(self) -> "Quota":
        """Return the quota of the positions that are not chosen."""
        return Quota(self.period, self.period - self.width)


EVERYTHING = Selection(1, ((0, 1),))
NOTHING = Selection(1, ())


def circular_window(start: int, width: int, modulus: int) -> Selection:
    """Return the `width` positions from `start`, modulo `modulus`; a wrapped window is two runs."""
    start %= modulus
    stop = start + width
    if stop <= modulus:
        runs: tuple[Run, ...] = ((start, stop),)
    else:
        runs = ((0, stop - modulus), (start, modulus))
    runs = tuple(run for run in runs if run[0] < run[1])
    return Selection(modulus, runs)
