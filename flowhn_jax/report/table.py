"""Results as text: a readable table, then one JSON object as the last line."""

import json
import math
from typing import Any


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_json(row: dict[str, Any]) -> str:
    """A row as one line of strict JSON, where numbers that are not finite become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite)


def print_result(result: dict[str, Any]) -> None:
    """Prints names and values in two columns, and the same as JSON."""
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {_cell(value)}")
    print(to_json(result))
