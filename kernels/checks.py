"""Checks of arguments, shared by all operations."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array


def refused_dtype(arrays: Mapping[str, Any], dtypes: tuple[str, ...]) -> str | None:
    """Return which array, by name, has another dtype than a backend takes; None if none has.

    Args:
      arrays: arrays by name; None for one that is left out.
      dtypes: names of the dtypes that the backend takes.
    """
    for name, x in arrays.items():
        if x is not None and x.dtype not in dtypes:
            return f"{name} is {x.dtype}, not {' or '.join(dtypes)}"
    return None


def check_arguments(
    operation: str,
    arrays: Mapping[str, Any],
    layouts: Sequence[str],
    *,
    optional: Collection[str] = (),
    integers: Collection[str] = (),
    booleans: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    may_be_empty: Collection[str] = (),
) -> dict[str, int]:
    """Check the arrays' dtypes and shapes; return the size of each letter of their layouts.

    Args:
      operation: name that begins the message.
      arrays: the arguments by name.
      layouts: for each of them, as 'B L E'. A letter has the size that it has in the first layout
        with it.
      optional: names of the arguments that may be None.
      integers: names of the arrays of integer dtype. Those not named here or in `booleans` are
        real floats.
      booleans: names of the arrays of booleans.
      sizes: sizes of letters that are known already.
      may_be_empty: letters whose size may be 0.

    Raises:
      ValueError: an argument is not an array, is empty, or has the wrong dtype or shape.
    """
    sizes = dict(sizes or {})
    for (name, array), layout in zip(arrays.items(), layouts, strict=True):
        if array is None and name in optional:
            continue
        if not is_array(array):
            found = "None" if array is None else type(array).__name__
            raise ValueError(f"{operation}: {name} must be an array; got {found}")
        _check_dtype(operation, name, array, name in integers, name in booleans)
        letters = layout.split()
        expected = f"{operation}: {name} must be [{', '.join(letters)}]"
        if len(array.shape) != len(letters):
            raise ValueError(f"{expected}; got shape {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            sizes.setdefault(letter, size)
        shape = tuple(sizes[letter] for letter in letters)
        if array.shape != shape:
            raise ValueError(f"{expected} = {shape}; got shape {array.shape}")
        for letter, size in zip(letters, shape, strict=True):
            if size == 0 and letter not in may_be_empty:
                raise ValueError(f"{expected} with {letter} at least 1; got shape {array.shape}")
    return sizes


def check_groups(operation: str, heads: int, groups: int, kind: str = "groups") -> None:
    """Raise a ValueError if heads cannot be divided into equal groups, as `kind` calls them."""
    if heads % groups:
        raise ValueError(
            f"{operation}: the number of heads must be a multiple of the {groups} {kind}; "
            f"got {heads} heads"
        )


def is_array(x: Any) -> TypeGuard[Array | jax.ShapeDtypeStruct]:
    """Return whether x has a shape and a dtype."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _check_dtype(operation: str, name: str, array: Any, is_integer: bool, is_boolean: bool) -> None:
    kind, expected = jnp.floating, "a real floating-point"
    if is_integer:
        kind, expected = jnp.integer, "an integer"
    elif is_boolean:
        kind, expected = jnp.bool_, "a boolean"
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{operation}: {name} must have {expected} dtype; got {array.dtype}")
