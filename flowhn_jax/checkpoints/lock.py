"""One trainer at a time in a workdir."""

import contextlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.utils.files import whole_file
from flowhn_jax.utils.lock import try_lock

_FILE = "lock"
_MAX_HOST = 255  # characters


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Hold the workdir's lock, which the system takes back from a process that dies.

    The lock is on the folder; the file in it only tells who had the lock last, and may be removed.

    Raises:
      ValueError: another process holds it; the message names its host and process id.
    """
    path = pathlib.Path(workdir) / _FILE
    with try_lock(pathlib.Path(workdir)) as is_free:
        if not is_free:
            raise ValueError(
                f"{workdir!r} is in use by {_holder(path)}; wait for it, stop it, or give another "
                "--workdir."
            )
        try:
            with whole_file(path) as temporary:
                holder = {"host": socket.gethostname(), "pid": os.getpid()}
                temporary.write_text(json.dumps(holder))
        except OSError as error:  # the lock is what counts
            if not disk.is_full(error):
                raise
        yield


def _holder(path: pathlib.Path) -> str:
    try:
        holder = json.loads(path.read_bytes())
        return f"process {int(holder['pid'])} on host {str(holder['host'])[:_MAX_HOST]}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process"  # the file was removed, or is about to be written
