"""JSON from files that a user gave."""

import json
from typing import Any

from flowhn_jax.utils.text import one_line


def loads(text: str | bytes, where: str) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises:
      ValueError: it is not JSON; the message begins with `where`.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is not JSON: it is nested too deeply.") from error
    except ValueError as error:  # JSON's, or of bytes that are not UTF-8
        raise ValueError(f"{where} is not JSON: {one_line(error)}.") from error
