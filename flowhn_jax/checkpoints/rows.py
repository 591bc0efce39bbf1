"""A run's rows of metrics as metrics.jsonl holds them, and in a bucket its further parts."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from flowhn_jax.storage import AnyPath, Place, place

Row = dict[str, Any]

FILE = "metrics.jsonl"
_MAX_NUMBER = 1e300  # largest value that sums and plots can hold


def part_name(number: int) -> str:
    """Return the name of a part: a run in a bucket begins a new one when the last one is large."""
    return f"metrics-{number:05d}.jsonl" if number else FILE


def parts_of(folder: Place) -> Iterator[Place]:
    """Yield the parts that exist, in order."""
    for number in itertools.count():
        part = folder / part_name(number)
        if not part.is_file():
            return
        yield part


def read_rows(workdir: AnyPath) -> list[Row]:
    """Return the rows of a workdir's metrics.jsonl, without a last line that a kill cut off.

    Raises:
      ValueError: a line before the last is not a row.
    """
    rows: list[Row] = []
    for part in parts_of(place(workdir)):
        last = rows[-1]["step"] if rows else None
        found = [row for row, _ in rows_and_ends(part.read(), str(part))]
        # A kill while parts were merged leaves rows in the first one and in a later one.
        rows += [row for row in found if last is None or row["step"] > last]
    return rows


def number(row: Row, key: str) -> float | None:
    """Return a row's value; None where it is absent, not finite, or no number."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _MAX_NUMBER else None  # False for NaN


def elapsed_seconds(rows: Sequence[Row]) -> list[float | None]:
    """Return the seconds of train steps up to each row, without validation, saves and compilation.

    From the first row without a time on they are unknown: None.
    """
    found: list[float | None] = []
    total: float | None = 0.0
    before = 0
    for row in rows:
        per_step = number(row, "step_seconds")
        total = (
            None if total is None or per_step is None else total + per_step * (row["step"] - before)
        )
        before = row["step"]
        found.append(total)
    return found


def merge_parts(workdir: AnyPath) -> None:
    """Make one file of the parts of a run that was copied from a bucket."""
    first, *others = parts_of(place(workdir))
    if not others:
        return
    write_rows(first, read_rows(workdir))
    for part in reversed(others):
        part.remove()


def write_rows(file: Place, rows: Sequence[Row]) -> None:
    """Write a file that holds these rows alone."""
    file.write_whole("".join(json.dumps(row) + "\n" for row in rows))


def rows_and_ends(content: bytes, name: str) -> Iterator[tuple[Row, int]]:
    """Yield each row of a file, and the number of bytes up to its end.

    What follows the last row is ignored: a line that a kill cut off, or zeros that a power cut
    left.

    Raises:
      ValueError: a line before the last is not a row; the message has the file's name.
    """
    lines = content.splitlines(keepends=True)
    rows = [_parse_row(line) for line in lines]
    count = max((number for number, row in enumerate(rows, 1) if row is not None), default=0)
    end = 0
    for number, (line, row) in enumerate(zip(lines[:count], rows, strict=False), 1):
        if row is None:
            raise ValueError(f"{name!r} is damaged: line {number} is not a row.")
        end += len(line)
        yield row, end


def _parse_row(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
