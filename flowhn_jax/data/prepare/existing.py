"""What is already at the folder to write: the same set, nothing, or something to leave alone."""

from typing import Any

from flowhn_jax.data.prepared import VERSION, PreparedSet, read_index
from flowhn_jax.storage import Place
from flowhn_jax.utils.text import short_repr


def holds_same_set(out: Place, request: dict[str, Any], overwrite: bool) -> bool:
    """Return True if `out` holds an intact set of this request, False if it may be written.

    Args:
      out: the folder.
      request: see `PreparedSet.request`.
      overwrite: whether a set of another request, or a damaged one, may be replaced.

    Raises:
      ValueError: `out` may not be written.
    """
    if not out.exists() or (out.is_dir() and not out.children()):
        return False
    try:
        found = read_index(out)
    except ValueError as error:
        raise ValueError(f"{out} exists and is left unchanged: {error}") from error
    existing = {"version": found.get("version"), "first_token": "eot"} | found["request"]
    requested = {"version": VERSION} | request
    if existing != requested:
        if overwrite:
            return False
        raise ValueError(_describe_differences(out, existing, requested))
    try:
        PreparedSet.open(out).verify()
    except ValueError as error:
        if overwrite:
            return False
        raise ValueError(f"{error} Type --overwrite to prepare it again.") from error
    return True


def _describe_differences(out: Place, existing: dict[str, Any], requested: dict[str, Any]) -> str:
    differences = "; ".join(
        f"{key}: has {short_repr(existing.get(key))}, requested {short_repr(value)}"
        for key, value in requested.items()
        if existing.get(key) != value
    )
    keep = ""
    if existing | {"first_token": requested["first_token"]} == requested:
        keep = f"--first_token={existing['first_token']} to use it, or "
    return (
        f"{out} holds another prepared set ({differences}); choose another folder, or type "
        f"{keep}--overwrite to replace it."
    )
