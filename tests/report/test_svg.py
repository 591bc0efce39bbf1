"""Charts as SVG: the points, ticks and texts that they hold."""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from flowhn_jax.report.svg import Series, key, line_chart


def numbers(text):
    return [float(each) for each in re.findall(r"-?[\d.]+", text)]


def ticks(root):
    """Return the place and the text of the ticks of both axes."""
    found = [each for each in root.iter("text") if each.get("class") == "tick"]
    by_axis = {"x": [], "y": []}
    for each in found:
        axis = "y" if each.get("text-anchor") == "end" else "x"
        by_axis[axis].append((float(each.get(axis)), each.text))
    return by_axis


def value_of(text):
    factor = {"k": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1)
    return float(text.rstrip("kMBT").replace(",", "")) * factor


def test_a_line_has_its_points_where_the_ticks_say(rng):
    """The scale that the ticks show gives the values of the drawn points back."""
    xs = sorted(rng.uniform(1e5, 5e6, 20))
    ys = rng.uniform(1.5, 6, 20)
    points = list(zip(xs, ys, strict=True))
    root = ElementTree.fromstring(line_chart("tokens", "nats", [Series("a", points)]))
    (line,) = root.iter("polyline")
    drawn = numbers(line.get("points"))
    for axis, places, values in (("x", drawn[::2], xs), ("y", drawn[1::2], ys)):
        (first, low), *_, (last, high) = ticks(root)[axis]
        low, high = value_of(low), value_of(high)
        offset = 4 if axis == "y" else 0  # of the text's baseline
        slope = (high - low) / (last - first)
        found = [low + (place - first + offset) * slope for place in places]
        assert found == pytest.approx(values, abs=0.2 * abs(slope))


def test_a_logarithmic_axis_has_powers_of_two():
    points = [(float(x), 1.0 + x) for x in (1, 2, 5, 128)]
    root = ElementTree.fromstring(line_chart("x", "y", [Series("a", points)], log_x=True))
    found = ticks(root)["x"]
    assert [text for _, text in found] == [str(2**power) for power in range(8)]
    (line,) = root.iter("polyline")
    drawn = numbers(line.get("points"))[::2]
    width = found[1][0] - found[0][0]
    assert drawn[2] == pytest.approx(found[0][0] + math.log2(5) * width, abs=0.2)


def test_missing_values_interrupt_a_line_and_bands_and_dots_are_drawn():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 2.0), (4, 1.0)]
    series = [Series("a <b>", points, errors=[0.1] * 5, has_dots=True, style=9)]
    root = ElementTree.fromstring(line_chart("x", "y", series))
    assert len(list(root.iter("polyline"))) == 2
    assert [each.find("title").text for each in root.iter("circle")] == [
        f"a <b>: {y:.4f} at {x}" for x, y in points if y is not None
    ]
    (band,) = root.iter("polygon")
    assert len(numbers(band.get("points"))) == 2 * 2 * 4
    assert next(root.iter("g")).get("class") == "c1"
    assert all(each.get("stroke-dasharray") for each in root.iter("polyline"))


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e-9, 1e-9], [1e12, 9e12], [-5.0, -5.0]])
def test_any_range_has_ticks_within_the_picture(values):
    points = [(float(x), y) for x, y in enumerate(values)]
    root = ElementTree.fromstring(line_chart("x", "y", [Series("a", points, has_dots=True)]))
    width, height = numbers(root.get("viewBox"))[2:]
    for axis, limit in (("x", width), ("y", height)):
        found = ticks(root)[axis]
        assert 1 <= len(found) <= 12
        assert all(0 <= place <= limit for place, _ in found)
        assert len({text for _, text in found}) == len(found)
    assert all(0 <= float(each.get("cy")) <= height for each in root.iter("circle"))


def test_nothing_to_draw_is_no_chart():
    assert line_chart("x", "y", [Series("a", [(1, None)]), Series("b", [])]) == ""


def test_eight_lines_differ_in_colour_and_neighbours_in_dashes():
    keys = [ElementTree.fromstring(key(style)) for style in range(8)]
    assert len({each.get("class") for each in keys}) == 8
    dashes = [each.find("line").get("stroke-dasharray") for each in keys]
    assert all(one != other for one, other in itertools.pairwise(dashes))
