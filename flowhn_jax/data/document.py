"""A document: text in memory or in a file, read piece by piece."""

import codecs
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

PIECE_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 26  # of one that is held in memory: 64 MiB

# Told how many bytes of the source were read since it was last told.
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: UTF-8 text in memory, or a range of a text file, which is never read whole."""

    name: str  # where it is from, for messages
    text: bytes | pathlib.Path
    advance: Advance | None = None  # where reading the pieces reads the source
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[bytes]:
        """The text in pieces of at most `PIECE_BYTES`, cut behind a line's end where there is one.

        A document is tokenized piece by piece, wherever it comes from, in bounded memory.

        Raises:
          ValueError: text that is not UTF-8, with its line.
        """
        line, rest = 1, b""
        with self._open() as stream:
            stream.seek(self.start)
            left = self._stop() - self.start
            while left or rest:
                block = stream.read(min(left, PIECE_BYTES - len(rest)))
                if self.advance:
                    self.advance(len(block))
                left = left - len(block) if block else 0
                text = rest + block
                cut = _cut(text) if left else len(text)
                piece, rest = text[:cut], text[cut:]
                check_utf8(piece, self.name, line)
                line += piece.count(b"\n")
                yield piece

    def halves(self, share: float) -> tuple["Document", "Document"]:
        """Two documents of which the second is about the last `share` of this one.

        The cut is behind a line, where one ends within a tenth of the text before it.

        Raises:
          ValueError: there is too little text to cut.
        """
        stop = self._stop()
        size = stop - self.start
        middle = self.start + min(int(size * (1 - share)), size - 1)
        with self._open() as stream:
            start = max(self.start, middle - min(PIECE_BYTES, 4 + size // 10))
            stream.seek(start)
            middle = start + _cut(stream.read(middle - start))
        if middle <= self.start:
            raise ValueError(f"{self.name}: {size} bytes are too little text to hold some out.")
        return (
            dataclasses.replace(self, stop=middle),
            dataclasses.replace(self, start=middle, name=f"{self.name} from byte {middle}"),
        )

    def _open(self) -> BinaryIO:
        return io.BytesIO(self.text) if isinstance(self.text, bytes) else self.text.open("rb")

    def _stop(self) -> int:
        if self.stop is not None:
            return self.stop
        return len(self.text) if isinstance(self.text, bytes) else self.text.stat().st_size


def _cut(text: bytes) -> int:
    """Where to cut a text that goes on: behind its last line, or else its last character."""
    if line_end := text.rfind(b"\n") + 1:
        return line_end
    for back, byte in enumerate(text[:-4:-1], 1):
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(text) - back if length > back else len(text)
    return len(text)


def check_utf8(text: bytes, name: str, line: int) -> None:
    """Raises ValueError where `text`, which starts on `line` of `name`, is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if line == 1 and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(
                f"{name}, line 1: not UTF-8 text, but UTF-16 by its byte order mark; convert it "
                "with iconv -f UTF-16 -t UTF-8."
            ) from error
        line += text.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}, line {line}: not UTF-8 text (byte 0x{text[error.start]:02x}: {error.reason})."
        ) from error
