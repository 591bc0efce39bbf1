"""Names, folders and weights of prepared sets, as `data.path` and `data.validation` give them."""

import dataclasses
import math
import re
from collections.abc import Iterable

from flowhn_jax.storage import check_scheme
from flowhn_jax.utils.text import short_repr

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_NAMED = re.compile(rf"({_NAME.pattern})=(.+)")
_MIXTURE = "PATH:WEIGHT,PATH:WEIGHT,..., each optionally as NAME=PATH:WEIGHT"
_MAX_WEIGHT = 1e9
_SETS = "NAME=PATH,NAME=PATH,... or PATH,PATH,..."


@dataclasses.dataclass(frozen=True)
class SetLabel:
    """The name and the weight of a prepared set of a run.

    Attributes:
      name: for metrics; '' for the only set that a run trains on.
      weight: its share of the training windows; 0 for a set used only for validation.
    """

    name: str
    weight: float


@dataclasses.dataclass(frozen=True)
class SetName(SetLabel):
    """A prepared set as a config names it, with the path of its folder."""

    path: str


def training_sets(text: str) -> tuple[SetName, ...]:
    """Return the sets of `data.path`, whose weights sum to 1; none for the embedded corpus.

    The text is a mixture if it has commas and a part between them ends with a weight, as in
    'A:0.7,B:0.3'. Otherwise it is the folder of one set.

    Raises:
      ValueError: a path, a name or a weight is missing or cannot be used.
    """
    if not text:
        return ()
    parts = text.split(",")
    weights = [_weight(part.rpartition(":")[2]) for part in parts]
    if len(parts) == 1 or all(weight is None for weight in weights):
        _check_path("data.path", text)
        return (SetName("", 1.0, text),)
    found = []
    for part, weight in zip(parts, weights, strict=True):
        if weight is None or not 0 < weight <= _MAX_WEIGHT:
            raise ValueError(
                f"data.path must be a folder, or {_MIXTURE}, with weights above 0 and up to "
                f"{_MAX_WEIGHT:g}; got "
                f"{short_repr(part)} in {short_repr(text)}."
            )
        found.append((*_named("data.path", part.rpartition(":")[0]), weight))
    total = math.fsum(weight for *_, weight in found)
    return tuple(SetName(name, weight / total, path) for name, path, weight in found)


def validation_sets(text: str) -> tuple[SetName, ...]:
    """Return the sets of `data.validation`.

    Raises:
      ValueError: a path or a name is missing or cannot be used.
    """
    parts = text.split(",") if text else ()
    named = (_named("data.validation", part) for part in parts)
    return tuple(SetName(name, 0.0, path) for name, path in named)


def check_names(sets: Iterable[SetName]) -> None:
    """Raise ValueError if two sets have the same name."""
    paths: dict[str, str] = {}
    for each in sets:
        if each.name in paths:
            raise ValueError(
                "data.path and data.validation must give each set a different name; "
                f"{short_repr(paths[each.name])} and {short_repr(each.path)} are both called "
                f"{each.name!r}. Type NAME={each.path} for one of them."
            )
        paths[each.name] = each.path


def _named(key: str, text: str) -> tuple[str, str]:
    """Return the name and the path of a set, given as NAME=PATH or PATH."""
    if given := _NAMED.fullmatch(text):
        name, path = given.groups()
    else:
        name, path = text.rstrip("/").rpartition("/")[2], text
    if not path:
        form = _MIXTURE if key == "data.path" else _SETS
        raise ValueError(f"{key} must be {form}; got a set without a path.")
    _check_path(key, path)
    if not _NAME.fullmatch(name) or not name.strip("."):
        weight = ":WEIGHT" if key == "data.path" else ""
        raise ValueError(
            f"{key}: the name of a set must be letters, digits, '_', '-' and '.', not dots alone; "
            f"got {short_repr(name)}. Type NAME={path}{weight} for another name."
        )
    return name, path


def _check_path(key: str, path: str) -> None:
    try:
        check_scheme(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _weight(text: str) -> float | None:
    """Return the text as a float; None if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return None
