"""A raw file around another one; subclasses extend how it is read."""

import io
from typing import Any


class WrappedFile(io.RawIOBase):
    """An open file whose bytes come from `fetch`, which a subclass extends."""

    def __init__(self, file: Any):
        self._file = file

    def fetch(self, size: int) -> bytes:
        """Return at most `size` bytes from the position on; none at the end."""
        return self._file.read(size)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        super().close()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Read at most `len(buffer)` bytes, and return how many; 0 at the end."""
        data = self.fetch(len(buffer))
        buffer[: len(data)] = data
        return len(data)
