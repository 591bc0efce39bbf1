"""JSON from files that a user gave."""

import json
from typing import Any

from flowhn_jax.utils.text import one_line

_MAX_DEPTH = 100  # levels of lists and objects


def loads(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises:
      ValueError: it is not JSON; the message begins with `where`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    except ValueError as error:  # JSON's, or of bytes that are not UTF-8
        raise ValueError(f"{where} is not JSON: {one_line(error)}.") from error
    else:
        # The parser of Python 3.12 takes more levels than functions that walk through them can.
        if _depth(value) <= _MAX_DEPTH:
            return value
    raise ValueError(f"{where} is not JSON: it is nested too deeply.")


def _depth(value: Any) -> int:
    """Return how many levels of lists and objects there are, or `_MAX_DEPTH` + 1 for more."""
    depth, level = 0, [value]
    while level and depth <= _MAX_DEPTH:
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [
            inner
            for each in containers
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        depth += bool(containers)
    return depth
