"""A full disk: how it is recognised, and how much is missing."""

import errno
import pathlib
import shutil

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What TensorStore, which gives no errno, says of these.
_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised for, says that something did not fit."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def missing(folder: pathlib.Path, needed: int) -> int:
    """Bytes that a file of `needed` bytes lacks in the file system of `folder`; 0: it fits."""
    return max(0, needed - shutil.disk_usage(folder).free)


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.3f} MB"
