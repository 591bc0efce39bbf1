"""Dataclasses from plain nested values, as of JSON or a ConfigDict, each checked by its type."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from flowhn_jax.utils.text import short_repr


def build(cls: type, values: Any, *, what: str, most: int = 2**63 - 1, prefix: str = "") -> Any:
    """A dataclass of its fields' values by name; those that are not there take their defaults.

    An integer serves as a float, a whole float as an integer, a numeral as a float where text is
    accepted, too. Fields may be dataclasses, tuples and dicts of these.

    Args:
      cls: the dataclass.
      values: its fields' values by name.
      what: what a name is called in messages.
      most: that an integer may be, either way.
      prefix: what the names begin with in messages.

    Raises:
      ValueError: an unknown or missing name, or a value of another type; the message tells the
        name, what was found and what is accepted.
    """
    if not isinstance(values, Mapping):
        whole = prefix.removesuffix(".") or "The whole"
        raise ValueError(f"{whole} is {short_repr(values)}; accepted is a group of {what}s.")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(str(name)[:100], hints, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Unknown {what} {short_repr(f'{prefix}{name}')}; the nearest is {prefix + near!r}. "
                f"Accepted here are {', '.join(hints)}."
            )
    for field in dataclasses.fields(cls):
        defaults = field.default, field.default_factory
        if field.name not in values and defaults == (dataclasses.MISSING,) * 2:
            raise ValueError(f"{prefix}{field.name} is missing; accepted is a value of it.")
    arguments = {
        name: _typed(hints[name], value, f"{prefix}{name}", what, most)
        for name, value in values.items()
    }
    return cls(**arguments)


def _typed(kind: Any, value: Any, key: str, what: str, most: int) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, what=what, most=most, prefix=f"{key}.")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} is {short_repr(value)}; accepted is a list.")
        inner = typing.get_args(kind)[0]
        return tuple(_typed(inner, each, f"{key}.{n}", what, most) for n, each in enumerate(value))
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} is {short_repr(value)}; accepted is a group of {what}s.")
        inner = typing.get_args(kind)[1]
        return {
            name: _typed(inner, each, f"{key}.{_short(name)}", what, most)
            for name, each in value.items()
        }
    return value if kind is Any else _plain(kind, value, key, most)


def _short(name: Any) -> str:
    """A name in a group of any names, as a part of a key."""
    return (
        name
        if isinstance(name, str) and name.isidentifier() and len(name) < 80
        else short_repr(name)
    )


def _plain(annotation: Any, value: Any, key: str, most: int) -> Any:
    """`value` as a str, int, float, bool, None, or one of several."""
    is_union = isinstance(annotation, types.UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    found = _converted(kinds, value)
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{key} is {found}; accepted is a finite number.")
    if isinstance(found, int) and abs(found) > most:
        raise ValueError(f"{key} is {short_repr(found)}; accepted is at most {most}, either way.")
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(
            f"{key} is {short_repr(value)}, a {type(value).__name__}; accepted is {names}."
        )
    return found


def _converted(kinds: tuple[type, ...], value: Any) -> Any:
    """`value` as one of the kinds, where it stands for one."""
    try:
        if str in kinds and float in kinds and isinstance(value, str):
            return float(value)
        if isinstance(value, (bool, *kinds)):
            return value
        if float in kinds and isinstance(value, int):
            return float(value)
        if int in kinds and isinstance(value, float) and value.is_integer():
            return int(value)
    except (ValueError, OverflowError):  # no numeral; an integer that no float can be
        pass
    return value
