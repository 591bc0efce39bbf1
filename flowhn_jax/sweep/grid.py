"""The grid of a sweep: config keys with values, and every combination of them as a point."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flowhn_jax.utils.text import short_repr


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: the name of its folder, such as 'learning_rate=1e-3_seed=0'.
      values: by config key, as they were typed.
    """

    name: str
    values: Mapping[str, str]


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values of each config key, of texts such as 'train.seed=0,1,2'.

    Raises:
      ValueError: there are no texts, or one has no key or values, or the key or a value twice.
    """
    example = "e.g. --grid=train.learning_rate=1e-3,3e-3"
    if not texts:
        raise ValueError(f"--grid must be given, {example}.")
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        values = tuple(value.strip() for value in listed.split(","))
        if not key or not all(values):
            raise ValueError(
                f"--grid must be KEY=VALUE,VALUE,..., {example}; got {short_repr(text)}."
            )
        if key in axes or len(set(values)) < len(values):
            raise ValueError(f"--grid must have each key and value once; got {short_repr(text)}.")
        axes[key] = values
    return axes


def points(axes: Mapping[str, Sequence[str]]) -> list[Point]:
    """Return all combinations, the last key varying fastest.

    Raises:
      ValueError: two points would have the same folder.
    """
    short = {key: key.rpartition(".")[2] for key in axes}
    if len(set(short.values())) < len(short):
        short = {key: key for key in axes}
    found = []
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        parts = (f"{short[key]}={_file_name(value)}" for key, value in values.items())
        found.append(Point("_".join(parts), values))
    names = [point.name for point in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--grid must give each run a folder of its own; two combinations give {twice!r}."
        )
    return found


def _file_name(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value)
