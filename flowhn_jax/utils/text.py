"""Short text for messages about values of any size that a user gave."""

import os
import reprlib
from collections.abc import Iterable
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8
_MAX_DIGITS = 40
_MAX_CHARACTERS = 1000
_MAX_PATH_CHARACTERS = 255  # the longest name of a file
_MAX_NAMES = 8


def short_repr(value: Any) -> str:
    """Return `repr` of a value, shortened if it is long or deep."""
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        return f"an integer of more than {_MAX_DIGITS} digits"
    return _REPR.repr(value)


def short_path(path: str | os.PathLike) -> str:
    """Return a path, or a flag with one, in quotes, without its middle if it is long."""
    text, half = repr(os.fspath(path)), _MAX_PATH_CHARACTERS // 2
    return text if len(text) <= _MAX_PATH_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def short_list(names: Iterable[Any]) -> str:
    """Return names separated by commas, the first few if there are many, each shortened."""
    found = [str(name) for name in names]
    shortened = [
        name if len(name) <= _REPR.maxstring else short_repr(name) for name in found[:_MAX_NAMES]
    ]
    more = len(found) - _MAX_NAMES
    return ", ".join(shortened) + (f" and {more:,} more" if more > 0 else "")


def one_line(error: BaseException | str) -> str:
    """Return a message as one line, without its middle if it is long."""
    text = " ".join(str(error).split())
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
