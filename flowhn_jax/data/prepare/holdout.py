"""Holding out: which documents are for validation, and whether they suffice."""

import math
import sys
from collections.abc import Iterator

import numpy as np

from flowhn_jax.data.document import Document
from flowhn_jax.data.prepared import Split

_MIN_VALIDATION_TOKENS = 1000
_MAX_SHARE_RATIO = 2  # between the held-out share of the text and the requested one


def with_holdout(documents: Iterator[Document], fraction: float) -> Iterator[Document]:
    """Yield the documents; of a single one, its beginning and its end, which is held out.

    Raises:
      ValueError: there is no text, or too little to hold out some.
    """
    first, second = next(documents, None), next(documents, None)
    if first is None:
        raise ValueError("The source must hold text; got none.")
    if second is None:
        yield from first.split(fraction)
    else:
        yield first
        yield second
        yield from documents


def is_held_out(numbers: np.ndarray, total: int, fraction: float) -> np.ndarray:
    """Return which documents are for validation: bool [D] for their numbers [D], counted from 1.

    Args:
      numbers: the numbers of the documents that `with_holdout` yields.
      total: the number of all documents.
      fraction: the share to hold out.
    """
    period = round(1 / fraction)
    return numbers % period == 0 if total >= period else numbers == total


def warn_about_holdout(splits: dict[str, Split], requested: float) -> None:
    """Print a warning if the validation split is too small, or far from the requested share."""
    held_out = splits["validation"]
    share = held_out.bytes / (splits["train"].bytes + held_out.bytes)
    documents = f"{held_out.documents:,} document{'s' * (held_out.documents > 1)}"
    found = f"{documents}, {held_out.tokens:,} tokens, {share:.2g} of the text"
    if held_out.tokens < _MIN_VALIDATION_TOKENS:
        needed = share * _MIN_VALIDATION_TOKENS / held_out.tokens
        advice = "prepare more text"
        if needed <= 0.5 and requested < 0.5:
            fraction = min(0.5, 2 * max(needed, requested))
            advice = f"type --validation_fraction={_rounded_up(fraction)}, or {advice}"
        print(
            f"warning: a validation loss needs at least {_MIN_VALIDATION_TOKENS:,} tokens, but "
            f"only {found} are held out; {advice}.",
            file=sys.stderr,
        )
    elif not requested / _MAX_SHARE_RATIO <= share <= requested * _MAX_SHARE_RATIO:
        print(
            f"warning: --validation_fraction={requested:g} requests {requested:.2g} of the text, "
            f"but {found} are held out, because only whole documents or lines are; prepare more "
            "and shorter documents, or type "
            f"--validation_fraction={_rounded_up(min(share, 0.5))} if this share is intended.",
            file=sys.stderr,
        )


def _rounded_up(fraction: float) -> str:
    """Return a fraction with few digits, as one types it."""
    digits = max(2, 1 - math.floor(math.log10(fraction)))
    return f"{math.ceil(fraction * 10**digits - 1e-9) / 10**digits:g}"
