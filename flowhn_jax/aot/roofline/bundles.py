"""Cycles of a TPU kernel from its static schedule, the VLIW bundles that libtpu dumps.

A bundle takes a cycle, waits for memory apart. Those of a loop count as often as it runs, and those
that a kernel may skip, such as the copies of a block that it has already, count as run.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0) +([A-Z, ]*): *(>*) *\{(.*)")
_DEFINITION = re.compile(r"%([sp]\d+(?:_[sp]\d+)?) = ([\w.]+)(?: /\*.*?\*/)? ([^;}]*)")
_BRANCH = re.compile(r"= sbr\.rel \(!?%(p\d+(?:_p\d+)?)\) target")
_PIPELINE_STEPS = 2  # that fill and drain the pipeline of a grid, without computing
_GRID = "/* iteration index, stage"
_MAX_MOVED = 8  # bundles in a row that the scheduler moves from an outer loop into an inner one

_Definitions = dict[str, tuple[str, str]]  # operation and operands of each scalar


class _Bundle(NamedTuple):
    """A bundle: whether a loop's body begins with it, the number of loops around it, its code."""

    begins_loop: bool
    depth: int
    code: str


def cycles(text: str) -> int:
    """Return the cycles of a kernel.

    A loop whose limit depends on the position in the kernel's grid counts with the largest limit;
    one whose limit is unknown counts once.

    Args:
      text: the text of libtpu's dump `final_bundles`.
    """
    bundles = [
        _Bundle("LB" in found[1], len(found[2]), found[3])
        for found in map(_BUNDLE.match, text.split("\n"))
        if found
    ]
    definitions = {name: (op, rest) for name, op, rest in _DEFINITION.findall(text)}
    times = [1] * len(bundles)
    for first, bundle in enumerate(bundles):
        if bundle.begins_loop:
            end = _end(bundles, first)
            trips = _trips([each.code for each in bundles[first:end]], definitions)
            for i in range(first, end):
                times[i] *= trips
    return sum(times)


def _end(bundles: Sequence[_Bundle], first: int) -> int:
    """Return the index after a loop's last bundle."""
    depth, end = bundles[first].depth, first + 1
    for i in range(first + 1, len(bundles)):
        if i - end >= _MAX_MOVED or (bundles[i].begins_loop and bundles[i].depth <= depth):
            break
        if bundles[i].depth >= depth:
            end = i + 1
    return end


def _trips(loop: Sequence[str], definitions: _Definitions) -> int:
    """Return how often a loop runs, by the comparison that its last branch depends on."""
    branches = [name for code in loop for name in _BRANCH.findall(code)]
    operation, operands = definitions.get(branches[-1], ("", "")) if branches else ("", "")
    if not operation.startswith("scmp.ge"):
        return 1
    limit = _upper_bound(operands.split(",")[1], definitions)
    if limit is None:
        return 1
    return max(1, limit - _PIPELINE_STEPS if _GRID in loop[0] else limit)


def _upper_bound(value: str, definitions: _Definitions) -> int | None:
    """Return the largest value of a scalar that is not negative; None if it is unknown."""
    value = re.sub(r"/\*.*?\*/", "", value).strip()
    if value.isdecimal():
        return int(value)
    if value.lstrip("%") not in definitions:
        return None
    operation, rest = definitions[value.lstrip("%")]
    operation = operation.partition(".")[0]
    if found := re.match(r"\(!%(\w+), (%\w+)\), (\S+)", rest):  # the second unless the first
        predicate = definitions.get(found[1], ("", ""))
        bounds = [_upper_bound(found[i], definitions) for i in (2, 3)]
        if predicate[0].startswith("scmp.lt") and predicate[1].startswith(found[2]):
            return min((x for x in bounds if x is not None), default=None)  # the smaller one
        return None if None in bounds else max(x for x in bounds if x is not None)
    bounds = [_upper_bound(x, definitions) for x in rest.split(",")[:2]]
    first, second = (*bounds, None)[:2]
    if operation == "ssub" or first is None:
        return first
    if operation == "smov":
        return first
    if second is None:
        return None
    of = {
        "sadd": first + second,
        "smul": first * second,
        "sshra": first >> second,
        "sshrl": first >> second,
    }
    return of.get(operation)
