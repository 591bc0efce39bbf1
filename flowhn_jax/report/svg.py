"""Line charts as plain SVG for a page: styled by the page's CSS, with nothing outside of it.

The chart is narrow, so that its text stays readable when a phone scales it to its width. Series
differ in colour and in dashes. The page defines the classes: `c0` to `c7` set `color`, and
`grid`, `axis`, `tick`, `label`, `line`, `band` and `dot` style the parts.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 24, 40  # margins
_TICKS = 5  # approximate maximum number on an axis
_COLOURS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_SI = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


class Series(NamedTuple):
    """A line of a chart.

    Attributes:
      name: in the tooltips of its dots.
      points: x and y, ascending in x; a y of None interrupts the line.
      errors: half the height of the band around each point; empty: there is no band.
      has_dots: whether each point has a dot.
      style: index that selects colour and dashes.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    errors: Sequence[float] = ()
    has_dots: bool = False
    style: int = 0


def line_chart(x_label: str, y_label: str, series: Sequence[Series], log_x: bool = False) -> str:
    """Return a chart as an `svg` element; '' if no series has a value.

    Args:
      x_label: the label of the horizontal axis, with its unit.
      y_label: the label of the vertical axis, with its unit.
      series: the lines.
      log_x: whether the horizontal axis is logarithmic to base 2; then all x are positive.
    """
    known = [(x, y) for each in series for x, y in each.points if y is not None]
    if not known:
        return ""
    x_axis = _Axis.of([x for x, _ in known], _LEFT, _WIDTH - _RIGHT, is_log=log_x)
    y_axis = _Axis.of([y for _, y in known], _HEIGHT - _BOTTOM, _TOP)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{html.escape(f"{y_label} over {x_label}")}">'
    ]
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{y_axis.text(value)}</text>"
        )
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">'
            f"{x_axis.text(value)}</text>"
        )
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="label" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
        f'<text class="label" x="0" y="12">{html.escape(y_label)}</text>'
    )
    parts += (_drawn(each, x_axis, y_axis) for each in series)
    return "".join([*parts, "</svg>"])


def key(style: int, has_dots: bool = False) -> str:
    """Return a short line in the style of a series, for a legend."""
    dot = '<circle class="dot" cx="14" cy="6" r="3"/>' if has_dots else ""
    return (
        f'<svg class="key c{style % _COLOURS}" viewBox="0 0 28 12" aria-hidden="true">'
        f'<line class="line" x1="0" x2="28" y1="6" y2="6"{_dashes(style)}/>{dot}</svg>'
    )


class _Axis(NamedTuple):
    """Maps values from `low` to `high` to places from `start` to `end`.

    A linear horizontal axis begins at zero.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float, is_log: bool = False) -> "_Axis":
        low, high = min(values), max(values)
        if is_log:
            return cls(low, max(high, 2 * low), start, end, True)
        if start < end:
            low = min(0.0, low)
        room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room if end < start else low, high + room, start, end, False)

    def place(self, value: float) -> float:
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            step = max(1, math.ceil((last - first) / (2 * _TICKS)))
            return [2.0**power for power in range(first, last + 1, step)]
        step = self._step()
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [number * step for number in range(first, last + 1)]

    def _step(self) -> float:
        """Return the distance of ticks: 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        return next(each * power for each in (1, 2, 5, 10) if each * power >= rough * (1 - 1e-9))

    def text(self, value: float) -> str:
        if self.is_log:
            return f"{value:,.0f}"
        if not value:
            return "0"
        size = max(abs(self.low), abs(self.high))
        unit, suffix = next(((u, s) for u, s in _SI if size >= u), (1.0, ""))
        decimals = max(0, -math.floor(math.log10(self._step() / unit) + 1e-9))
        return f"{value / unit:.{decimals}f}{suffix}"


def _dashes(style: int) -> str:
    dashes = _DASHES[style % len(_DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _drawn(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    """Return a series as an SVG group."""

    def at(x: float, y: float) -> str:
        return f"{x_axis.place(x):.1f},{y_axis.place(min(max(y, y_axis.low), y_axis.high)):.1f}"

    parts = [f'<g class="c{series.style % _COLOURS}">']
    if series.errors:
        known = [
            (x, y, error)
            for (x, y), error in zip(series.points, series.errors, strict=True)
            if y is not None and math.isfinite(error)
        ]
        edge = [at(x, y + error) for x, y, error in known]
        edge += [at(x, y - error) for x, y, error in reversed(known)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    run: list[str] = []
    for x, y in [*series.points, (0.0, None)]:
        if y is not None:
            run.append(at(x, y))
            continue
        if len(run) > 1:
            points = " ".join(run)
            parts.append(f'<polyline class="line" points="{points}"{_dashes(series.style)}/>')
        run = []
    for x, y in series.points if series.has_dots else ():
        if y is not None:
            place_x, place_y = at(x, y).split(",")
            text = html.escape(f"{series.name}: {y:,.4f} at {x:,.0f}")
            parts.append(
                f'<circle class="dot" cx="{place_x}" cy="{place_y}" r="3"><title>{text}</title>'
                "</circle>"
            )
    return "".join([*parts, "</g>"])
