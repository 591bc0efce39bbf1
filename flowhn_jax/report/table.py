"""Results as text: a readable table, then one JSON object as the last line."""

import json
import math
from collections.abc import Collection, Sequence
from typing import Any


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def to_json(row: dict[str, Any], indent: int | None = None) -> str:
    """Return strict JSON, where numbers that are not finite become null; one line by default."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(row), indent=indent)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned as text, too; all columns but the first to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]  # the shortest rule is '--:'
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])} |"

    return "\n".join(map(line, [headings, rule, *rows]))


def print_result(result: dict[str, Any], shown: Collection[str] = ()) -> None:
    """Prints names and values in two columns, but for what was `shown` before, and all as JSON."""
    left = {name: value for name, value in result.items() if name not in shown}
    width = max(map(len, left))
    for name, value in left.items():
        print(f"{name:<{width}}  {_cell(value)}")
    print(to_json(result))
