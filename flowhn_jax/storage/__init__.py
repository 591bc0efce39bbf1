"""Where a run, its data and its results lie: a local folder, or a bucket (gs://)."""

from flowhn_jax.storage.errors import StorageError, is_storage_error
from flowhn_jax.storage.lease import Lock
from flowhn_jax.storage.local import LocalPlace
from flowhn_jax.storage.open import (
    AnyPath,
    check_scheme,
    is_remote,
    place,
    readable_place,
    temporary_folder,
)
from flowhn_jax.storage.place import Place

__all__ = [
    "AnyPath",
    "LocalPlace",
    "Lock",
    "Place",
    "StorageError",
    "check_scheme",
    "is_remote",
    "is_storage_error",
    "place",
    "readable_place",
    "temporary_folder",
]
