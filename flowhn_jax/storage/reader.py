"""Reading an object of a bucket block by block, from any position."""

import io
from typing import Any

from flowhn_jax.storage.errors import StorageError
from flowhn_jax.storage.requests import repeated


class ObjectReader(io.RawIOBase):
    """An open object; each call of `readinto` is one request, repeated while it may succeed."""

    def __init__(self, name: str, blob: Any, timeout: float):
        """Open an object.

        Args:
          name: the name of the object, for messages.
          blob: the client's handle, with size and generation.
          timeout: seconds for one answer.
        """
        self._name, self._blob, self._timeout = name, blob, timeout
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        self._position = offset + (0, self._position, self._blob.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most `len(buffer)` bytes, and return how many; 0 at the end.

        Raises:
          FileNotFoundError: the object was removed.
          StorageError: it was replaced, or cannot be read.
        """
        from google.api_core.exceptions import PreconditionFailed

        start, stop = self._position, min(self._position + len(buffer), self._blob.size)
        if start >= stop:
            return 0
        try:
            data = repeated(
                f"reading {self._name}",
                lambda: self._blob.download_as_bytes(
                    start=start,
                    end=stop - 1,
                    if_generation_match=self._blob.generation,
                    checksum=None,  # there is none of a part
                    timeout=self._timeout,
                    retry=None,
                ),
            )
        except PreconditionFailed as error:
            raise StorageError(f"{self._name} was replaced while it was read.") from error
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
