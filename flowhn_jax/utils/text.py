"""What error messages say of values that a user gave, which may be of any size."""

import os
import reprlib
from collections.abc import Iterable
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8
_MOST_DIGITS = 40
_MOST_CHARACTERS = 1000
_MOST_OF_A_PATH = 255  # the longest name of a file
_MOST_NAMES = 8


def shown(value: Any) -> str:
    """`repr`, shortened where it is long or deep."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return f"an integer of more than {_MOST_DIGITS} digits"
    return _REPR.repr(value)


def shown_path(path: str | os.PathLike) -> str:
    """Return a path, file name or flag that names one in quotes, without its middle if long."""
    text, half = repr(os.fspath(path)), _MOST_OF_A_PATH // 2
    return text if len(text) <= _MOST_OF_A_PATH else f"{text[:half]}...{text[-half:]}"


def listed(names: Iterable[Any]) -> str:
    """Return names with commas between them, the first of many, each shortened."""
    found = [str(name) for name in names]
    shortened = [
        name if len(name) <= _REPR.maxstring else shown(name) for name in found[:_MOST_NAMES]
    ]
    more = len(found) - _MOST_NAMES
    return ", ".join(shortened) + (f" and {more:,} more" if more > 0 else "")


def one_line(error: BaseException | str) -> str:
    """A message as one line, without its middle where it is long."""
    text = " ".join(str(error).split())
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
