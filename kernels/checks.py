"""Checks of arguments that all operations share."""

from jax import Array


def refused_dtype(arrays: dict[str, Array | None], accepted: tuple[str, ...]) -> str | None:
    """Which array, by name, is of another dtype than a backend takes; None: none is."""
    for name, x in arrays.items():
        if x is not None and x.dtype not in accepted:
            return f"{name} is {x.dtype}, not {' or '.join(accepted)}"
    return None


def check_shapes(
    operation: str, sizes: dict[str, int], arrays: dict[str, tuple[Array | None, str]]
) -> None:
    """Raise a ValueError where an array does not have its shape.

    Args:
      operation: the name that begins the message.
      sizes: the size each letter of a layout stands for.
      arrays: by name, each array and its layout, as 'B L E'. None passes.
    """
    for name, (array, layout) in arrays.items():
        letters = layout.split()
        shape = tuple(sizes[letter] for letter in letters)
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{operation}: {name} must be [{', '.join(letters)}] = {shape}, "
                f"found shape {array.shape}"
            )
