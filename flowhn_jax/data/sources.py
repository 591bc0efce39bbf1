"""Sources: files, folders and Hugging Face datasets as one stream of documents."""

import codecs
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from flowhn_jax.data import corpus, packages_corpus
from flowhn_jax.data.document import Document, OnBytesRead
from flowhn_jax.data.library_errors import errors_as_value_error, iterate
from flowhn_jax.data.records import check_size, read_json_lines, read_parquet, text_of
from flowhn_jax.data.source_files import Listing, SourceFile, file_at, find_files
from flowhn_jax.data.tokenizer_config import is_download
from flowhn_jax.storage import Place, place, readable_place
from flowhn_jax.utils.wrapped_file import WrappedFile

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
      identity: a line of text that changes if the documents may have changed.
      size: the bytes to read; None if unknown.
      read: yields the documents that are not empty, and reports the bytes it reads to its argument.
      is_reproducible: whether equal identities stand for equal documents; not for a dataset of the
        hub, which may change at any time.
      check_unchanged: raises ValueError, with the name of the file, if the source no longer
        matches `identity`; to be called after all documents have been read.
    """

    identity: str
    size: int | None
    read: Callable[[OnBytesRead], Iterator[Document]]
    check_unchanged: Callable[[], None] = lambda: None
    is_reproducible: bool = True


def open_source(spec: str, text_field: str = "text") -> Source:
    """Return a source; its documents are read later.

    Reading raises ValueError for a malformed line or row, and names it. A .txt file may have any
    size; a line of a .jsonl file and the text of a row have at most `MAX_DOCUMENT_BYTES`. A byte
    order mark (U+FEFF) at the start of a file is dropped.

    Args:
      spec: a .txt file (one document); a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file (one
        document per line or row); a folder, whose files of these kinds are read in the order of
        their paths; all of these also in a bucket (gs://) or on the Hugging Face hub, as
        hf://datasets/NAME/FILE; 'hf:NAME[:CONFIG]', the train split of a dataset of the hub or of a
        folder that `datasets.load_dataset` reads; 'embedded'; or 'packages'.
      text_field: the field or column with the text.

    Raises:
      FileNotFoundError, ValueError: there is nothing to read.
      ImportError: a package that this source needs is missing; the message names it.
    """
    if spec == "embedded":
        texts = corpus.embedded_documents()
        return _text_source(texts, corpus.describe(texts))
    if spec == "packages":
        texts = packages_corpus.package_documents()
        return _text_source(texts, corpus.describe(texts, "packages corpus"))
    if is_download(spec):
        return _hugging_face_source(spec, text_field)
    return _file_source(readable_place(spec), text_field)


def _text_source(texts: dict[str, bytes], identity: str) -> Source:
    def read(on_bytes_read: OnBytesRead) -> Iterator[Document]:
        for name, text in texts.items():
            yield Document(name, text, on_bytes_read)

    return Source(identity, sum(map(len, texts.values())), read)


def _hugging_face_source(spec: str, field: str) -> Source:
    name = spec.removeprefix("hf:")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"Source {spec} needs the package 'datasets': pip install datasets"
        ) from error
    identity, check_unchanged = spec, lambda: None
    if is_local := place(name).is_dir():
        config, folder = None, place(name)
        listing = Listing(lambda: [file_at(file, name) for name, file in folder.walk()])
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

    return Source(identity, None, read, check_unchanged, is_reproducible=is_local)


def _file_source(path: Place, field: str) -> Source:
    listing = Listing(lambda: _find_files(path))

    def read(on_bytes_read: OnBytesRead) -> Iterator[Document]:
        for file in listing.files:
            if not file.place.is_remote:  # a remote file is only checked after all were read
                listing.check_unchanged(file)
            yield from (d for d in _read_file(file.place, field, on_bytes_read) if d.text)

    return Source(listing.identity, listing.size, read, listing.check_all_unchanged)


def _find_files(path: Place) -> list[SourceFile]:
    """Return the files of a source, sorted by path, without hidden ones."""
    if not path.exists():
        raise FileNotFoundError(f"Source {path} does not exist.")
    is_file = path.is_file()
    if not is_file:
        found = find_files(path, lambda name: _suffix(name) is not None)
    else:
        found = [file_at(path, path.name)] if _suffix(path.name) else []
    if not found:
        what = "must hold" if path.is_dir() else "must be"
        raise ValueError(f"Source {path} {what} a file of the kinds {', '.join(_SUFFIXES)}.")
    return found


def _suffix(name: str) -> str | None:
    return next((s for s in _SUFFIXES if name.lower().endswith(s)), None)


def _read_file(path: Place, field: str, on_bytes_read: OnBytesRead) -> Iterator[Document]:
    if _suffix(path.name) == ".txt":
        with path.open() as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        if path.size() > start:
            on_bytes_read(start)
            yield Document(str(path), path, on_bytes_read, start)
        return
    read = read_parquet if _suffix(path.name) == ".parquet" else read_json_lines
    with path.open() as opened:
        file = io.BufferedReader(_CountedFile(opened, on_bytes_read), 1 << 17)
        yield from read(path, file, field)


class _CountedFile(WrappedFile):
    """An open file that reports how many of its bytes were read."""

    def __init__(self, file: BinaryIO, on_bytes_read: OnBytesRead):
        super().__init__(file)
        self._on_bytes_read = on_bytes_read

    def fetch(self, size: int) -> bytes:
        """Return at most `size` bytes from the position on; none at the end."""
        data = super().fetch(size)
        self._on_bytes_read(len(data))
        return data
