"""What error messages say of values that a user gave, which may be of any size."""

import reprlib
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = 8
_MOST_DIGITS = 40
_MOST_CHARACTERS = 1000


def shown(value: Any) -> str:
    """`repr`, shortened where it is long or deep."""
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return f"an integer of more than {_MOST_DIGITS} digits"
    return _REPR.repr(value)


def one_line(error: BaseException | str) -> str:
    """A message as one line, without its middle where it is long."""
    text = " ".join(str(error).split())
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
