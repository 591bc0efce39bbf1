"""Recognize storage that refuses writes for now, and measure how much space is missing."""

import errno
import shutil

from flowhn_jax.storage import AnyPath, is_storage_error, place
from flowhn_jax.utils.memory import is_out_of_memory

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What TensorStore, which gives no errno, writes for these.
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED")


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(text in str(error) for text in _TEXTS) and not is_out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuses_writes(error: BaseException | None) -> bool:
    """Return whether an error says that the disk is full or that a bucket refuses requests.

    Either may pass, so that a run continues and saves later.
    """
    return is_full(error) or is_storage_error(error)


def missing(folder: AnyPath, needed: int) -> int:
    """Return how many of `needed` bytes do not fit on the file system of `folder`."""
    folder = place(folder)
    return 0 if folder.is_remote else max(0, needed - shutil.disk_usage(folder.local()).free)


def megabytes(count: int) -> str:
    """Return a number of bytes as text in megabytes."""
    return f"{count / 1e6:,.3f} MB"
