"""Results as text: tables for people, and JSON for programs as the last line."""

import json
import math
from collections.abc import Collection, Sequence
from typing import Any


def text_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> str:
    """Return a table in plain text, columns separated by two spaces.

    Args:
      headings: one for each column; a line break in one makes a second line of headings.
      rows: cells that are formatted already, as many in each row as there are headings.
      left: indices of the columns that are aligned to the left; all others are to the right.
    """
    height = max(heading.count("\n") for heading in headings) + 1
    split = [(heading.split("\n") + [""] * height)[:height] for heading in headings]
    lines = [*zip(*split, strict=True), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, aligned in plain text as well; all columns but the first right.

    Args:
      headings: one for each column.
      rows: cells that are formatted already, as many in each row as there are headings.
    """
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]  # the shortest rule is '--:'
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)])} |"

    return "\n".join(map(line, [headings, rule, *rows]))


def format_value(value: Any) -> str:
    """Return a value for people: thousands separated, floats with four decimals below 100."""
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


def print_result(result: dict[str, Any], shown: Collection[str] = ()) -> None:
    """Print a result as two columns, then all of it as one line of JSON.

    Args:
      result: values by name.
      shown: names that the columns leave out, since they were printed before.
    """
    rows = [[name, format_value(each)] for name, each in result.items() if name not in shown]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print(to_json(result))
