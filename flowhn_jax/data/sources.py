"""Sources: files, folders and Hugging Face datasets as one stream of documents."""

import codecs
import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from flowhn_jax.data import corpus
from flowhn_jax.data.document import Document, OnBytesRead
from flowhn_jax.data.library_errors import errors_as_value_error, iterate
from flowhn_jax.data.records import check_size, read_json_lines, read_parquet, text_of

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
      identity: a line of text that changes if the documents may have changed.
      size: the bytes to read; None if unknown.
      read: yields the documents that are not empty, and reports the bytes it reads to its argument.
      check_unchanged: raises ValueError, with the name of the file, if the source no longer
        matches `identity`; to be called after all documents have been read.
    """

    identity: str
    size: int | None
    read: Callable[[OnBytesRead], Iterator[Document]]
    check_unchanged: Callable[[], None] = lambda: None


def open_source(spec: str, text_field: str = "text") -> Source:
    """Return a source; its documents are read later.

    Reading raises ValueError for a malformed line or row, and names it. A .txt file may have any
    size; a line of a .jsonl file and the text of a row have at most `MAX_DOCUMENT_BYTES`. A byte
    order mark (U+FEFF) at the start of a file is dropped.

    Args:
      spec: a .txt file (one document); a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file (one
        document per line or row); a folder, whose files of these kinds are read in the order of
        their paths; 'hf:NAME[:CONFIG]', the train split of a dataset of the Hugging Face hub or of
        a folder that `datasets.load_dataset` reads; or 'embedded'.
      text_field: the field or column with the text.

    Raises:
      FileNotFoundError, ValueError: there is nothing to read.
      ImportError: a package that this source needs is missing; the message names it.
    """
    if spec == "embedded":
        return _embedded_source()
    if spec.startswith("hf:"):
        return _hugging_face_source(spec, text_field)
    return _file_source(pathlib.Path(spec), text_field)


def _embedded_source() -> Source:
    texts = corpus.embedded_documents()

    def read(on_bytes_read: OnBytesRead) -> Iterator[Document]:
        for name, text in texts.items():
            yield Document(name, text, on_bytes_read)

    return Source(corpus.describe(texts), sum(map(len, texts.values())), read)


def _hugging_face_source(spec: str, field: str) -> Source:
    name = spec.removeprefix("hf:")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Source {spec} needs the package 'datasets': pip install datasets"
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
        # The library raises for the network, absent datasets or configurations, damaged files.
        with errors_as_value_error(f"Source {spec}"):
            dataset = datasets.load_dataset(name, config or None, split="train", streaming=True)
        yield from iterate(dataset, f"Source {spec}")

    def read(on_bytes_read: OnBytesRead) -> Iterator[Document]:
        for number, row in enumerate(rows(), 1):
            where = f"{spec}, row {number}"
            if text := text_of(row, field, where):
                check_size(len(text), where)
                on_bytes_read(len(text))
                yield Document(where, text)

    return Source(identity, None, read, check_unchanged)


def _file_source(path: pathlib.Path, field: str) -> Source:
    root = path if path.is_dir() else path.parent
    listing = _Listing(root, lambda: _find_files(path))

    def read(on_bytes_read: OnBytesRead) -> Iterator[Document]:
        for file in listing.files:
            listing.check_unchanged(file)
            yield from (d for d in _read_file(file, field, on_bytes_read) if d.text)

    return Source(listing.identity, listing.size, read, listing.check_all_unchanged)


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a source, sorted by path, without hidden ones."""
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
        what = "must hold" if path.is_dir() else "must be"
        raise ValueError(f"Source {path} {what} a file of the kinds {', '.join(_SUFFIXES)}.")
    return sorted(found)


def _suffix(path: pathlib.Path) -> str | None:
    return next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)


def _read_file(path: pathlib.Path, field: str, on_bytes_read: OnBytesRead) -> Iterator[Document]:
    if _suffix(path) == ".txt":
        with path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        if path.stat().st_size > start:
            on_bytes_read(start)
            yield Document(str(path), path, on_bytes_read, start)
        return
    read = read_parquet if _suffix(path) == ".parquet" else read_json_lines
    with io.BufferedReader(_CountedFile(path, on_bytes_read), 1 << 17) as file:
        yield from read(path, file, field)


class _CountedFile(io.FileIO):
    """A file that reports how many of its bytes were read."""

    def __init__(self, path: pathlib.Path, on_bytes_read: OnBytesRead):
        super().__init__(path)
        self._on_bytes_read = on_bytes_read

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._on_bytes_read(count)
        return count


class _Listing:
    """The files of a source, whose names, sizes and modification times stand for their content.

    Attributes:
      files: their paths.
      identity: a line of text that changes if the files may have changed.
      size: the bytes of all files.
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
        """Raise ValueError if a file is no longer the one that was listed."""
        try:
            is_same = _state(file) == self._known.get(file)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise ValueError(
                f"{file} must not change while it is prepared, but it did; prepare the source "
                "again."
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
