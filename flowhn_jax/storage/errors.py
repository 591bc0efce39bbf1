"""Errors of remote storage, and how to recognise those that libraries raise."""

_GOOGLE = ("google.", "gcsfs.", "aiohttp.", "requests.", "urllib3.")
# What TensorStore, which raises ValueError and the like, writes about requests to a bucket, and
# gcsfs, which raises OSError, about those that are refused.
_TEXTS = ("gs://", "storage.googleapis.com", "HTTP response code", "Forbidden", "/storage/v1/b/")


class StorageError(OSError):
    """A request to a bucket failed for good; the message names the object and the reason."""


def is_storage_error(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a failed request to a bucket."""
    while error is not None:
        if isinstance(error, StorageError) or type(error).__module__.startswith(_GOOGLE):
            return True
        if any(text in str(error) for text in _TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
