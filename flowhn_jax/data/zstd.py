"""Reading .zst files in bounded memory."""

import io
from collections.abc import Iterator
from typing import BinaryIO


class ZstdFile(io.RawIOBase):
    """The decompressed content of a .zst file, with one block (at most 128 KiB) in memory."""

    def __init__(self, file: BinaryIO):
        self._blocks = _blocks(file)
        self._block = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer) -> int:
        """Read at most `len(buffer)` bytes, and return how many; 0 at the end.

        Raises:
          EOFError: the file is damaged or truncated.
        """
        while not self._block:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._block = memoryview(block)
        count = min(len(buffer), len(self._block))
        buffer[:count], self._block = self._block[:count], self._block[count:]
        return count


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the blocks of all frames, decompressed (RFC 8878, section 3.1).

    The library gets one block at a time. It decompresses everything that it is given at once, to
    up to 30,000 times the size, and does not notice that a file was truncated.

    Raises:
      EOFError: the file is damaged or truncated.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "A .zst file needs the package 'zstandard': pip install zstandard"
        ) from error

    def take(count: int) -> bytes:
        taken = file.read(count)
        if len(taken) < count:
            raise EOFError("it ends within a frame")
        return taken

    while start := file.read(4):
        magic = int.from_bytes(start, "little")
        if magic & ~0xF == 0x184D2A50:  # a skippable frame
            size = int.from_bytes(take(4), "little")
            while size:
                size -= len(take(min(size, 1 << 20)))
            continue
        if magic != 0xFD2FB528:
            raise EOFError("there is no zstd frame where one must start")
        descriptor = take(1)[0]
        single_segment, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        window, dictionary = 1 - single_segment, (0, 1, 2, 4)[descriptor & 3]
        content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            yield frame.decompress(
                start + bytes([descriptor]) + take(window + dictionary + content_size)
            )
            is_last = False
            while not is_last:
                header = take(3)
                fields = int.from_bytes(header, "little")
                is_last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
                yield frame.decompress(header + take(1 if kind == 1 else size))
            if has_checksum:
                yield frame.decompress(take(4))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if not frame.eof:
            raise EOFError("a frame has no end")
