"""Sources: files, folders and Hugging Face datasets as one stream of documents."""

import codecs
import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from flowhn_jax.data import corpus
from flowhn_jax.data.document import MAX_DOCUMENT_BYTES, Advance, Document, check_utf8
from flowhn_jax.data.native import failures_as_value_error, read_all
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_list, short_repr

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
      identity: a line that changes where the documents may have changed.
      size: bytes to be read, None where nobody knows.
      read: given what to tell of progress, yields the documents; empty ones are left out.
      check_unchanged: raises ValueError where the source is no longer what `identity` stands for,
        with the name of the file; to be called once the text of all documents has been read.
    """

    identity: str
    size: int | None
    read: Callable[[Advance], Iterator[Document]]
    check_unchanged: Callable[[], None] = lambda: None


class _CountedFile(io.FileIO):
    """A file that tells how many of its bytes were read."""

    def __init__(self, path: pathlib.Path, advance: Advance):
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._advance(count)
        return count


def _text_of(row: Any, field: str, where: str) -> bytes:
    """The text of one record."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise ValueError(f"{where}: a JSON {kind}, not an object with a {short_repr(field)}.")
    if field not in row:
        names = short_list(row) or "nothing"
        raise ValueError(
            f"{where}: no field {short_repr(field)}, only {names}; name the one with the text."
        )
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ValueError(f"{where}: field {short_repr(field)} is of type {kind}, not a string.")
    try:
        return row[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair, which is no text: {error}.") from error


def _check_size(size: int, what: str) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{what} must have at most {MAX_DOCUMENT_BYTES:,} bytes, and has more; split it, or "
            "make it a .txt file, which is read in pieces."
        )


class _ZstdFile(io.RawIOBase):
    """The decompressed content of a .zst file, one block (at most 128 KiB) in memory at a time."""

    def __init__(self, file: BinaryIO):
        self._blocks = _zstd_blocks(file)
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._block:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._block = memoryview(block)
        count = min(len(buffer), len(self._block))
        buffer[:count], self._block = self._block[:count], self._block[count:]
        return count


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the blocks of all frames, decompressed (RFC 8878, section 3.1).

    The library is given a block at a time: it would decompress what it is given at once, up to
    30,000 times as many bytes, and it takes a file that was truncated for a whole one.

    Raises:
      EOFError: the file is damaged or truncated.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "A .zst file needs the package 'zstandard' (pip install zstandard)."
        ) from error

    def take(count: int) -> bytes:
        taken = file.read(count)
        if len(taken) < count:
            raise EOFError("it ends within a frame")
        return taken

    while start := file.read(4):
        magic = int.from_bytes(start, "little")
        if magic & ~0xF == 0x184D2A50:  # a frame to skip
            size = int.from_bytes(take(4), "little")
            while size:
                size -= len(take(min(size, 1 << 20)))
            continue
        if magic != 0xFD2FB528:
            raise EOFError("no zstd frame where one has to start")
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
            raise EOFError("a frame without an end")


def _json_lines(path: pathlib.Path, file: BinaryIO, field: str) -> Iterator[Document]:
    kind = _suffix(path)
    if kind == ".jsonl.gz":
        file = gzip.GzipFile(fileobj=file)
    elif kind == ".jsonl.zst":
        file = io.BufferedReader(_ZstdFile(file), 1 << 17)
    number = 0
    while True:
        try:
            line = file.readline(MAX_DOCUMENT_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged or truncated after line {number}: {error}."
            ) from error
        if not line:
            return
        number += 1
        where = f"{path}, line {number}"
        _check_size(len(line), where)
        check_utf8(line, str(path), number)
        text = line.decode("utf-8-sig").strip(" \t\r\n")
        if text:
            yield Document(where, _text_of(json_text.loads(text, where), field, where))


def _parquet(path: pathlib.Path, file: BinaryIO, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "A .parquet file needs the package 'pyarrow' (pip install pyarrow)."
        ) from error
    with failures_as_value_error(f"{path}: damaged"):
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
    if field not in schema.names:
        raise ValueError(
            f"{path}: no column {short_repr(field)}, only {short_list(schema.names)}; name the one with the "
            "text."
        )
    damaged = f"{path}: damaged"
    with failures_as_value_error(damaged):
        # What a file stores once for many rows stays stored once.
        dictionary = [field] if pyarrow.types.is_string(schema.field(field).type) else None
        table = pyarrow.parquet.ParquetFile(
            file, metadata=table.metadata, read_dictionary=dictionary, buffer_size=1 << 20
        )
        groups = range(table.metadata.num_row_groups)
    number = 0
    for group in groups:
        with failures_as_value_error(f"{path}: damaged after row {number}"):
            rows, size = _group_size(table.metadata.row_group(group), field)
            mean_size = max(0, size - (1 << 20)) // max(rows, 1)  # but for the pages' headers
        # Whole pages are decompressed, so that it would be late to look at the rows.
        _check_size(
            mean_size, f"{path}, rows {number + 1} to {number + rows}: field {field!r} of each"
        )
        batches = table.iter_batches(
            batch_size=max(1, min(1024, MAX_DOCUMENT_BYTES * rows // max(size, 1))),
            row_groups=[group],
            columns=[field],
        )
        for batch in read_all(batches, f"{path}: damaged in the {rows} rows after row {number}"):
            for cell in batch.column(0):
                number += 1
                where = f"{path}, row {number}"
                with failures_as_value_error(f"{where}: damaged"):
                    cell = cell.value if isinstance(cell, pyarrow.DictionaryScalar) else cell
                    is_text = isinstance(cell, pyarrow.StringScalar | pyarrow.LargeStringScalar)
                    raw = cell.as_buffer() if is_text and cell.is_valid else None
                if raw is None:
                    with failures_as_value_error(f"{where}: damaged"):
                        value = cell.as_py()
                    text = _text_of({field: value}, field, where)
                else:
                    _check_size(raw.size, f"{where}, field {field!r}")
                    text = raw.to_pybytes()
                    check_utf8(text, where, 1)
                yield Document(where, text)


def _group_size(group: Any, field: str) -> tuple[int, int]:
    """Return the rows of a row group, and its bytes, decompressed: at least those of a column.

    Where the rows are large, the bytes are the column's alone. These are not asked for otherwise:
    where they are damaged, the library ends the process.
    """
    rows, size = group.num_rows, group.total_byte_size
    if size > rows * MAX_DOCUMENT_BYTES:
        columns = (group.column(i) for i in range(group.num_columns))
        size = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] == field
        )
    return rows, size


def _suffix(path: pathlib.Path) -> str | None:
    return next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)


def _read_file(path: pathlib.Path, field: str, advance: Advance) -> Iterator[Document]:
    if _suffix(path) == ".txt":
        with path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        if path.stat().st_size > start:
            advance(start)
            yield Document(str(path), path, advance, start)
        return
    reader = _parquet if _suffix(path) == ".parquet" else _json_lines
    with io.BufferedReader(_CountedFile(path, advance), 1 << 17) as file:
        yield from reader(path, file, field)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a source, sorted by path; hidden ones are left out."""
    if not path.exists():
        raise FileNotFoundError(f"Source {path} does not exist.")
    if path.is_file():
        found = [path] if _suffix(path) else []
    else:
        found = []
        for folder, children, names in os.walk(path):
            children[:] = (child for child in children if not child.startswith("."))
            inside = (pathlib.Path(folder, name) for name in names if not name.startswith("."))
            found += [file for file in inside if _suffix(file) and file.is_file()]
    if not found:
        what = "holds no" if path.is_dir() else "is no"
        raise ValueError(f"Source {path} {what} {', '.join(_SUFFIXES)} file.")
    return sorted(found)


def _file_source(path: pathlib.Path, field: str) -> Source:
    root = path if path.is_dir() else path.parent
    listing = _Listing(root, lambda: _files(path))

    def read(advance: Advance) -> Iterator[Document]:
        for file in listing.files:
            listing.check_unchanged(file)
            yield from (d for d in _read_file(file, field, advance) if d.text)

    return Source(listing.identity, listing.size, read, listing.check_all_unchanged)


class _Listing:
    """The files of a source: names, sizes and times of change stand for their content.

    Attributes:
      files: their paths.
      identity: a line that changes where the files may have changed.
      size: bytes of all.
    """

    def __init__(self, root: pathlib.Path, find: Callable[[], list[pathlib.Path]]):
        self._find = find
        self._known = {file: _state(file) for file in find()}
        self.files = list(self._known)
        self.size = sum(size for size, _, _ in self._known.values())
        lines = (
            f"{file.relative_to(root).as_posix()}\t{size}\t{time}\n"
            for file, (size, time, _) in self._known.items()
        )
        digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
        self.identity = (
            f"{len(self.files)} files, {self.size} bytes, sha256 of their listing {digest}"
        )

    def check_unchanged(self, file: pathlib.Path) -> None:
        """Raise ValueError if a file is not the one that was listed."""
        try:
            is_same = _state(file) == self._known.get(file)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ValueError(
                f"{file} must stay as it is while it is prepared, and was changed; prepare the "
                "source again."
            )

    def check_all_unchanged(self) -> None:
        """Raise ValueError if any file was changed, added or removed."""
        try:
            now = self._find()
        except (ValueError, FileNotFoundError):  # nothing is left
            now = []
        for file in sorted({*self.files, *now}):
            self.check_unchanged(file)


def _state(file: pathlib.Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _embedded_source() -> Source:
    texts = corpus.embedded_documents()

    def read(advance: Advance) -> Iterator[Document]:
        for name, text in texts.items():
            yield Document(name, text, advance)

    return Source(corpus.describe(texts), sum(map(len, texts.values())), read)


def _hugging_face_source(spec: str, field: str) -> Source:
    name = spec.removeprefix("hf:")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Source {spec} needs the package 'datasets' (pip install datasets)."
        ) from error
    identity, check_unchanged = spec, lambda: None
    if pathlib.Path(name).is_dir():
        config, folder = None, pathlib.Path(name)
        listing = _Listing(folder, lambda: sorted(p for p in folder.rglob("*") if p.is_file()))
        identity = f"{spec}: {listing.identity}"
        check_unchanged = listing.check_all_unchanged
    else:
        name, _, config = name.partition(":")

    def rows() -> Iterator[Any]:
        # Network, absent dataset or configuration, damaged files.
        with failures_as_value_error(f"Source {spec}"):
            dataset = datasets.load_dataset(name, config or None, split="train", streaming=True)
        yield from read_all(dataset, f"Source {spec}")

    def read(advance: Advance) -> Iterator[Document]:
        for number, row in enumerate(rows(), 1):
            where = f"{spec}, row {number}"
            if text := _text_of(row, field, where):
                _check_size(len(text), where)
                advance(len(text))
                yield Document(where, text)

    return Source(identity, None, read, check_unchanged)


def open_source(spec: str, text_field: str = "text") -> Source:
    """Opens a source.

    Args:
      spec: a .txt (one document), .jsonl, .jsonl.gz, .jsonl.zst or .parquet file (a document a
        line or row); a folder, whose files of these kinds are read in the order of their paths;
        'hf:NAME[:CONFIG]', the train split of a dataset of the Hugging Face hub, or a folder that
        `datasets.load_dataset` takes; or 'embedded'.
      text_field: the field or column that holds the text.

    Raises:
      FileNotFoundError, ValueError: nothing there that can be read.
      ImportError: a package that this kind needs is missing; the message names it.

    Reading raises ValueError where a line or row is not what it should be, and names the place. A
    .txt file may be of any size; a line of a .jsonl file, or a row's text, has at most
    `MAX_DOCUMENT_BYTES`. A byte order mark (U+FEFF) at the start of a file is left out.
    """
    if spec == "embedded":
        return _embedded_source()
    if spec.startswith("hf:"):
        return _hugging_face_source(spec, text_field)
    return _file_source(pathlib.Path(spec), text_field)
