"""A file that is whole or absent under its name."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what then gets the name `path`, in place of a file or link of that name."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # one that was left, or a link to something else
    yield temporary
    os.replace(temporary, path)
