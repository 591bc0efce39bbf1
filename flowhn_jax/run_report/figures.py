"""The curves of runs as figures of a page."""

import html
import statistics
from collections.abc import Sequence

from flowhn_jax.checkpoints.rows import number
from flowhn_jax.report.plots import bin_positions
from flowhn_jax.report.svg import Series, key, line_chart
from flowhn_jax.run_report.record import BITS, Record

_MAX_POINTS = 300  # of a line
_TOKENS = "training tokens"


def figures(records: Sequence[Record]) -> list[str]:
    """Return the figures as HTML: losses, validation, speed and losses by position."""
    found = [
        _over_tokens(records, "Training loss", "nats per token", "loss"),
        _over_tokens(records, "Validation", "bits per byte", BITS, has_dots=True),
        _over_tokens(records, "Speed", "tokens per second", "tokens_per_second"),
        _over_tokens(records, "Model FLOPs utilization", "share of the peak", "mfu"),
        _by_position(records),
    ]
    return [figure for figure in found if figure]


def _over_tokens(
    records: Sequence[Record], title: str, unit: str, name: str, has_dots: bool = False
) -> str:
    """Return the figure of a key of the rows; '' if no run has a value."""
    series = []
    for style, record in enumerate(records):
        points: list[tuple[float, float | None]] = [
            (tokens, number(row, name)) for row, tokens in record.values("tokens") if name in row
        ]
        series.append(Series(record.name, points if has_dots else _thinned(points),
                             has_dots=has_dots, style=style))  # fmt: skip
    return _figure(title, line_chart(_TOKENS, unit, series), series)


def _thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Return at most `_MAX_POINTS` points, each the mean of as many neighbours."""
    size = -(-len(points) // _MAX_POINTS)
    if size <= 1:
        return points
    found: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [y for _, y in part if y is not None]
        middle = statistics.fmean(x for x, _ in part)
        found.append((middle, statistics.fmean(known) if known else None))
    return found


def _by_position(records: Sequence[Record]) -> str:
    series = []
    for style, record in enumerate(records):
        if record.curve is not None:
            middles, means, errors = bin_positions(record.curve)
            points = list(zip(middles.tolist(), means.tolist(), strict=True))
            series.append(Series(record.name, points, (2 * errors).tolist(), style=style))
    unit = "nats per token; band: two standard errors"
    chart = line_chart("preceding tokens in the window", unit, series, log_x=True)
    return _figure("Loss by position", chart, series)


def _figure(title: str, chart: str, series: Sequence[Series]) -> str:
    if not chart:
        return ""
    entries = "".join(
        f"<li>{key(each.style, each.has_dots)}{html.escape(each.name)}</li>"
        for each in series
        if any(y is not None for _, y in each.points)
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{chart}"
        f'<ul class="legend">{entries}</ul></figure>'
    )
