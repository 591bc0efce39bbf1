"""The largest batch, a power of two, that fits in memory: by compiling, never by running."""

import dataclasses
import math
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Attempt(Generic[Result]):
    """The outcome of compiling for one batch size.

    Attributes:
      result: what the caller wants to know of the largest batch that fits.
      fits: whether it fits in memory.
      fixed: bytes that do not depend on the batch.
      temporaries: bytes that grow with it; 0 if the compiler reports only that it does not fit.
    """

    result: Result
    fits: bool
    fixed: int = 0
    temporaries: int = 0


class NoBatchFitsError(ValueError):
    """Not even a batch of 1 fits."""


def largest_batch(
    attempt: Callable[[int], Attempt[Result]], start: int, memory: int, most: int | None = None
) -> Attempt[Result]:
    """Return the attempt at the largest power of two that fits, in few attempts.

    Larger sizes are tried as long as one fits, smaller ones until one does. The temporaries of the
    last attempt, assumed proportional to the batch, predict which sizes fit: a size is skipped if
    its double fits by that estimate, and is not tried if it would need 1.5 times the memory.

    Args:
      attempt: compiles for a batch size.
      start: the first size to try, rounded down to a power of two.
      memory: bytes available.
      most: the largest size to try, rounded down likewise; None for no bound.

    Raises:
      NoBatchFitsError: not even a batch of 1 fits.
    """
    each = _power_of_two(start if most is None else min(start, most))
    best: tuple[int, Attempt[Result]] | None = None
    too_many = None if most is None else 2 * _power_of_two(most)
    while each:
        found = attempt(each)
        room = memory - found.fixed
        if found.fits:
            best = each, found
            largest = 2 * each if too_many is None else too_many // 2
            if largest <= each or 2 * found.temporaries > 1.5 * room:
                break
            factor = 2 ** max(1, int(math.log2(room / max(1, found.temporaries))))
            each = each * factor if too_many is None else min(each * factor, too_many // 2)
        elif found.temporaries and room <= 0:  # no batch fits
            break
        else:
            too_many = each
            shrunk = each * room / found.temporaries if 0 < room < found.temporaries else each / 2
            each = min(each // 2, _power_of_two(max(1, shrunk)))
            if best is not None and each <= best[0]:
                break
    if best is None:
        raise NoBatchFitsError(f"Not even 1 sequence fits into {memory / 2**30:.2f} GiB.")
    return best[1]


def _power_of_two(number: float) -> int:
    """Return the largest power of two that is at most `number`, which is at least 1."""
    return 2 ** int(math.log2(number))
