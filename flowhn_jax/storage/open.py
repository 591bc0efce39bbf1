"""Which kind of storage a path that a user gave is of."""

import contextlib
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterator

from flowhn_jax.storage.local import LocalPlace
from flowhn_jax.storage.place import Place
from flowhn_jax.utils.text import short_path

AnyPath = str | os.PathLike[str] | Place

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKET = "gs://"
_HUB = "hf://"


def place(path: AnyPath) -> Place:
    """Return the place of a path.

    Raises:
      ValueError: it begins with a scheme that is not served, such as s3://, or a package that
        gs:// needs is missing.
    """
    if isinstance(path, Place):
        return path
    text = os.fspath(path)
    check_scheme(text)
    if is_remote(text):
        from flowhn_jax.storage.bucket import BucketPlace

        return BucketPlace.parse(text)
    return LocalPlace(pathlib.Path(path))


def readable_place(path: AnyPath) -> Place:
    """Return the place of a path that is only read, which may also be on the Hugging Face hub.

    Raises:
      ValueError, ImportError: as in `place`, or a package that hf:// needs is missing.
    """
    if isinstance(path, Place) or not os.fspath(path).startswith(_HUB):
        return place(path)
    from flowhn_jax.storage.hub import HubPlace

    return HubPlace.parse(os.fspath(path))


@contextlib.contextmanager
def temporary_folder(parent: Place) -> Iterator[Place]:
    """Yield a new folder in `parent`, which is removed when the context ends."""
    if isinstance(parent, LocalPlace):
        with tempfile.TemporaryDirectory(dir=parent.local()) as folder:
            yield LocalPlace(pathlib.Path(folder))
        return
    remote = parent / f"temporary-{uuid.uuid4().hex[:8]}"
    try:
        yield remote
    finally:
        remote.remove_tree()


def is_remote(path: AnyPath) -> bool:
    """Return whether a path lies in a bucket."""
    return path.is_remote if isinstance(path, Place) else os.fspath(path).startswith(_BUCKET)


def check_scheme(path: str | os.PathLike[str], others: tuple[str, ...] = ()) -> None:
    """Raise ValueError if a path begins with a scheme that is not served.

    Args:
      path: what the user gave.
      others: schemes that the caller serves itself, e.g. ("hf",).
    """
    text = os.fspath(path)
    found = _SCHEME.match(text)
    if found is None or text.startswith(_BUCKET) or found[1] in others:
        return
    if found[1] == "gs":
        raise ValueError(
            f"a path in a bucket must begin with gs://; got {short_path(text)}. A library may have "
            "removed a slash."
        )
    raise ValueError(
        f"paths must be local or begin with gs://; got {short_path(text)}. Mount that storage as a "
        "folder, and give the folder."
    )
