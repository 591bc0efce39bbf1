"""A measurement that may fail without ending the others."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Return `row` with what `measure` returns or, if it raises, with its message as `failed`."""
    try:
        return row | measure()
    except Exception as error:  # out of memory, or a peer that fails: the others continue
        return row | {"failed": failure(error)}


def failure(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
