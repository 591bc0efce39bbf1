"""Build dataclasses from nested values, as in JSON or a ConfigDict, checking every type."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from flowhn_jax.utils.text import short_repr

T = TypeVar("T")


def build(cls: type[T], values: Any, *, what: str, most: int = 2**63 - 1, prefix: str = "") -> T:
    """Return a dataclass made of its fields' values by name; missing ones take their defaults.

    An integer is accepted for a float, a whole float for an integer, and a numeral such as "0.5"
    for a float in a field of type `float | str`; the value is converted. Fields may be dataclasses,
    and tuples and dicts of dataclasses.

    Args:
      cls: the dataclass.
      values: its fields' values by name.
      what: what messages call a name, such as "config key".
      most: largest absolute value of an integer.
      prefix: added before names in messages, such as "model.split.".

    Raises:
      ValueError: a name is unknown or missing, or a value is of another type; the message names
        the key, what it must be and what was found.
    """
    if not isinstance(values, Mapping):
        where = prefix.removesuffix(".") or "the top level"
        raise ValueError(f"{where} must be a group of {what}s; got {short_repr(values)}.")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(str(name)[:100], hints, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown {what} {short_repr(f'{prefix}{name}')}; the nearest is "
                f"{prefix + near!r}. Known here: {', '.join(hints)}."
            )
    for field in dataclasses.fields(typing.cast(Any, cls)):
        defaults = field.default, field.default_factory
        if field.name not in values and defaults == (dataclasses.MISSING,) * 2:
            raise ValueError(f"{prefix}{field.name} must be given; it is missing.")
    arguments = {
        name: _typed(hints[name], value, f"{prefix}{name}", what, most)
        for name, value in values.items()
    }
    return cls(**arguments)


def _typed(kind: Any, value: Any, key: str, what: str, most: int) -> Any:
    """Return a value as `kind`: a plain type, a dataclass, or a tuple or dict of these.

    Raises:
      ValueError: the value is of another type.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, what=what, most=most, prefix=f"{key}.")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} must be a list; got {short_repr(value)}.")
        inner = typing.get_args(kind)[0]
        return tuple(_typed(inner, each, f"{key}.{n}", what, most) for n, each in enumerate(value))
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be a group of {what}s; got {short_repr(value)}.")
        inner = typing.get_args(kind)[1]
        return {
            name: _typed(inner, each, f"{key}.{_short(name)}", what, most)
            for name, each in value.items()
        }
    return value if kind is Any else _plain(kind, value, key, most)


def _short(name: Any) -> str:
    """Return the name of a dict's entry as it appears in a dotted key."""
    return (
        name
        if isinstance(name, str) and name.isidentifier() and len(name) < 80
        else short_repr(name)
    )


def _plain(annotation: Any, value: Any, key: str, most: int) -> Any:
    """Return `value` as a str, int, float, bool, None, or one of several of these.

    Raises:
      ValueError: the value is of another type, too large, or not finite.
    """
    is_union = isinstance(annotation, types.UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    found = _converted(kinds, value)
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{key} must be a finite number; got {found}.")
    if isinstance(found, int) and abs(found) > most:
        limit = f"at most {most}" if found > 0 else f"at least {-most}"
        raise ValueError(f"{key} must be {limit}; got {short_repr(found)}.")
    if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(
            f"{key} must be {names}; got {short_repr(value)} ({type(value).__name__})."
        )
    return found


def _converted(kinds: tuple[type, ...], value: Any) -> Any:
    """Return `value` converted to one of the kinds as `build` describes, else unchanged."""
    try:
        if str in kinds and float in kinds and isinstance(value, str):
            return float(value)
        if isinstance(value, (bool, *kinds)):
            return value
        if float in kinds and isinstance(value, int):
            return float(value)
        if int in kinds and isinstance(value, float) and value.is_integer():
            return int(value)
    except (ValueError, OverflowError):  # not a numeral; an integer that no float can hold
        pass
    return value
