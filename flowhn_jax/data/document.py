"""A document: text in memory or in a file, read in chunks."""

import codecs
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from flowhn_jax.storage import Place

CHUNK_BYTES = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 26  # of a document in memory: 64 MiB

# Called with the number of bytes of the source that were read since the last call.
OnBytesRead = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: UTF-8 text in memory, or a range of a text file, which is never read whole.

    Attributes:
      name: where the document comes from, for messages.
      text: the text itself, or where its file is.
      on_bytes_read: called as `chunks` reads; None if the source was already read.
      start, stop: the range of bytes in the text; None: to the end.
    """

    name: str
    text: bytes | Place
    on_bytes_read: OnBytesRead | None = None
    start: int = 0
    stop: int | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the text in chunks of at most `CHUNK_BYTES` that end with a line if one ends there.

        Every document is tokenized chunk by chunk, in bounded memory.

        Raises:
          ValueError: the text is not UTF-8; the message names the line.
        """
        line, rest = 1, b""
        with self._open() as stream:
            stream.seek(self.start)
            left = self._stop() - self.start
            while left or rest:
                block = stream.read(min(left, CHUNK_BYTES - len(rest)))
                if self.on_bytes_read:
                    self.on_bytes_read(len(block))
                left = left - len(block) if block else 0
                text = rest + block
                end = _chunk_end(text) if left else len(text)
                chunk, rest = text[:end], text[end:]
                check_utf8(chunk, self.name, line)
                line += chunk.count(b"\n")
                yield chunk

    def split(self, share: float) -> tuple["Document", "Document"]:
        """Return two documents, of which the second has about the last `share` of the text.

        The first ends with a line, if one ends within the last tenth of its text.

        Raises:
          ValueError: there is too little text to split.
        """
        stop = self._stop()
        size = stop - self.start
        middle = self.start + min(int(size * (1 - share)), size - 1)
        with self._open() as stream:
            start = max(self.start, middle - min(CHUNK_BYTES, 4 + size // 10))
            stream.seek(start)
            middle = start + _chunk_end(stream.read(middle - start))
        if middle <= self.start:
            raise ValueError(
                f"{self.name} must have enough text to hold out a part for validation; "
                f"got {size} bytes."
            )
        return (
            dataclasses.replace(self, stop=middle),
            dataclasses.replace(self, start=middle, name=f"{self.name} from byte {middle}"),
        )

    def _open(self) -> BinaryIO:
        return io.BytesIO(self.text) if isinstance(self.text, bytes) else self.text.open()

    def _stop(self) -> int:
        if self.stop is not None:
            return self.stop
        return len(self.text) if isinstance(self.text, bytes) else self.text.size()


def _chunk_end(text: bytes) -> int:
    """Return where to end a chunk of a longer text: after its last line, or last character."""
    if line_end := text.rfind(b"\n") + 1:
        return line_end
    for back, byte in enumerate(text[:-4:-1], 1):
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(text) - back if length > back else len(text)
    return len(text)


def check_utf8(text: bytes, name: str, line: int) -> None:
    """Raise ValueError if `text`, which starts on `line` of `name`, is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if line == 1 and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(
                f"{name}, line 1: the text must be UTF-8, but its byte order mark says UTF-16; "
                "convert it with iconv -f UTF-16 -t UTF-8"
            ) from error
        line += text.count(b"\n", 0, error.start)
        raise ValueError(
            f"{name}, line {line}: the text must be UTF-8; "
            f"got byte 0x{text[error.start]:02x} ({error.reason})."
        ) from error
