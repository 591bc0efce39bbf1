"""Interleaving: which set of a mixture each training window is from."""

import sys
from collections.abc import Sequence

import grain

_RESOLUTION = 10**6  # weights are rounded to 1 / _RESOLUTION


class Interleaving(grain.transforms.DatasetSelectionMap):
    """The order in which endless sets alternate, so that every prefix has their shares.

    Of the first k windows, set i has its share of k, to within one window per set. Unlike
    `grain.MapDataset.mix` it rounds shares to a millionth, not to a hundredth of the smallest one,
    and it has `counts`.
    """

    def __init__(self, weights: Sequence[float]):
        """Make the order.

        Args:
          weights: the weights of the sets, above 0.
        """
        total = sum(weights)
        self._shares = [max(1, round(weight / total * _RESOLUTION)) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the set of a window, and the window's position in that set's own order."""
        before, after = self.counts(index), self.counts(index + 1)
        chosen = next(i for i, count in enumerate(before) if after[i] != count)
        return chosen, before[chosen]

    def counts(self, windows: int) -> list[int]:
        """Return how many of the first `windows` windows are from each set."""
        found, left = [], sum(self._shares)
        for share in self._shares:
            others = windows * (left - share) // left
            found.append(windows - others)
            windows, left = others, left - share
        return found
