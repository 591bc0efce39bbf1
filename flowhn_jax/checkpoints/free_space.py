"""Recognises a full disk, and measures how much space is missing."""

import errno
import pathlib
import shutil

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What TensorStore, which gives no errno, writes for these.
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED")


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def missing(folder: pathlib.Path, needed: int) -> int:
    """Return how many of `needed` bytes do not fit on the file system of `folder`."""
    return max(0, needed - shutil.disk_usage(folder).free)


def megabytes(count: int) -> str:
    """Return a number of bytes as text in megabytes."""
    return f"{count / 1e6:,.3f} MB"
