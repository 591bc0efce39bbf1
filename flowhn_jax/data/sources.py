"""Sources: files, folders and Hugging Face datasets as one stream of documents."""

import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from flowhn_jax import json_text
from flowhn_jax.data import corpus
from flowhn_jax.data.document import Advance, Document, check_utf8

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
      identity: a line that changes where the documents may have changed.
      size: bytes to be read, None where nobody knows.
      read: given what to tell of progress, yields the documents; empty ones are left out.
    """

    identity: str
    size: int | None
    read: Callable[[Advance], Iterator[Document]]


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
        raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object with a {field!r}.")
    if field not in row:
        names = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"{where}: no field {field!r}, only {names}; name the one with the text.")
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise ValueError(f"{where}: field {field!r} is of type {kind}, not a string.")
    try:
        return row[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a surrogate pair, which is no text: {error}.") from error


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "A .zst file needs the package 'zstandard' (pip install zstandard)."
        ) from error

    def blocks():
        frame = None
        while block := file.read(1 << 17):
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame:  # the library itself takes a file that was cut short for a whole one
            raise EOFError("it ends within a frame")

    rest = b""
    try:
        for block in blocks():
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
    yield rest


def _json_lines(path: pathlib.Path, file: BinaryIO, field: str) -> Iterator[Document]:
    kind = _suffix(path)
    if kind == ".jsonl.gz":
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=file)
    else:
        lines = _zstd_lines(file) if kind == ".jsonl.zst" else file
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            check_utf8(line, str(path), number)
            if not line.strip():
                continue
            row = json_text.loads(line.decode("utf-8-sig"), where)
            yield Document(where, _text_of(row, field, where))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut short behind line {number}: {error}.") from error


def _parquet(path: pathlib.Path, file: BinaryIO, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "A .parquet file needs the package 'pyarrow' (pip install pyarrow)."
        ) from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if field not in columns:
            raise ValueError(
                f"{path}: no column {field!r}, only {', '.join(columns)}; name the one with the "
                "text."
            )
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for row in batch.to_pylist():
                number += 1
                where = f"{path}, row {number}"
                yield Document(where, _text_of(row, field, where))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged behind row {number}: {error}.") from error


def _suffix(path: pathlib.Path) -> str | None:
    return next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)


def _read_file(path: pathlib.Path, field: str, advance: Advance) -> Iterator[Document]:
    if _suffix(path) == ".txt":
        if path.stat().st_size:
            yield Document(str(path), path, advance)
        return
    reader = _parquet if _suffix(path) == ".parquet" else _json_lines
    with io.BufferedReader(_CountedFile(path, advance)) as file:
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
    files = _files(path)
    root = path if path.is_dir() else path.parent
    identity, size = _listing(root, files)

    def read(advance: Advance) -> Iterator[Document]:
        for file in files:
            yield from (d for d in _read_file(file, field, advance) if d.text)

    return Source(identity, size, read)


def _listing(root: pathlib.Path, files: list[pathlib.Path]) -> tuple[str, int]:
    """Identity and bytes of files: names, sizes and times of change stand for their content."""
    stats = [file.stat() for file in files]
    size = sum(stat.st_size for stat in stats)
    lines = (
        f"{file.relative_to(root).as_posix()}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
        for file, stat in zip(files, stats, strict=True)
    )
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return f"{len(files)} files, {size} bytes, sha256 of their listing {digest}", size


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
    identity = spec
    if pathlib.Path(name).is_dir():
        config, folder = None, pathlib.Path(name)
        everything = sorted(path for path in folder.rglob("*") if path.is_file())
        identity = f"{spec}: {_listing(folder, everything)[0]}"
    else:
        name, _, config = name.partition(":")

    def rows() -> Iterator[Any]:
        try:
            yield from datasets.load_dataset(name, config or None, split="train", streaming=True)
        except Exception as error:  # network, absent dataset or configuration, damaged files
            raise ValueError(f"Source {spec}: {error}") from error

    def read(advance: Advance) -> Iterator[Document]:
        for number, row in enumerate(rows(), 1):
            where = f"{spec}, row {number}"
            if text := _text_of(row, field, where):
                advance(len(text))
                yield Document(where, text)

    return Source(identity, None, read)


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

    Reading raises ValueError where a line or row is not what it should be, and names the place.
    """
    if spec == "embedded":
        return _embedded_source()
    if spec.startswith("hf:"):
        return _hugging_face_source(spec, text_field)
    return _file_source(pathlib.Path(spec), text_field)
