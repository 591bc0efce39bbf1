"""Checks of arguments that all operations share."""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array


def refused_dtype(arrays: dict[str, Array | None], accepted: tuple[str, ...]) -> str | None:
    """Which array, by name, is of another dtype than a backend takes; None: none is."""
    for name, x in arrays.items():
        if x is not None and x.dtype not in accepted:
            return f"{name} is {x.dtype}, not {' or '.join(accepted)}"
    return None


def check_arguments(
    operation: str,
    required: Mapping[str, tuple[Array, str]],
    optional: Mapping[str, tuple[Array | None, str]] | None = None,
    *,
    integers: Collection[str] = (),
    booleans: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    may_be_empty: Collection[str] = (),
) -> dict[str, int]:
    """Check the arrays' dtypes and shapes; return the size of each letter of their layouts.

    Args:
      operation: name that begins the message.
      required: by name, each array and its layout, as 'B L E'. A letter has the size that it has in
        the first layout with it.
      optional: as `required`, for arrays that may be None.
      integers: names of the arrays of integer dtype. All that are not named are real floats.
      booleans: names of the arrays of booleans.
      sizes: sizes of letters that are known before.
      may_be_empty: letters whose size may be 0.

    Raises:
      ValueError: an array is none, is empty, or has another dtype or shape.
    """
    sizes = dict(sizes or {})
    present = {name: pair for name, pair in (optional or {}).items() if pair[0] is not None}
    for name, (array, layout) in (required | present).items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            found = "None" if array is None else type(array).__name__
            raise ValueError(f"{operation}: {name} must be an array, found {found}")
        _check_dtype(operation, name, array, name in integers, name in booleans)
        letters = layout.split()
        described = f"{operation}: {name} must be [{', '.join(letters)}]"
        if len(array.shape) != len(letters):
            raise ValueError(f"{described}, found shape {array.shape}")
        for letter, size in zip(letters, array.shape, strict=True):
            sizes.setdefault(letter, size)
        shape = tuple(sizes[letter] for letter in letters)
        if array.shape != shape:
            raise ValueError(f"{described} = {shape}, found shape {array.shape}")
        for letter, size in zip(letters, shape, strict=True):
            if size == 0 and letter not in may_be_empty:
                raise ValueError(
                    f"{described} with {letter} of at least 1, found shape {array.shape}"
                )
    return sizes


def _check_dtype(operation: str, name: str, array: Any, is_integer: bool, is_boolean: bool) -> None:
    kind, word = jnp.floating, "a real float dtype"
    if is_integer:
        kind, word = jnp.integer, "an integer dtype"
    elif is_boolean:
        kind, word = jnp.bool_, "bool"
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{operation}: {name} must be of {word}, found {array.dtype}")
