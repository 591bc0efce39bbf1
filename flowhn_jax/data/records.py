"""Records: documents from the lines of .jsonl files and the rows of .parquet files and datasets."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from flowhn_jax.data.document import MAX_DOCUMENT_BYTES, Document, check_utf8
from flowhn_jax.data.library_errors import errors_as_value_error, iterate
from flowhn_jax.data.zstd import ZstdFile
from flowhn_jax.storage import Place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import short_list, short_repr


def text_of(record: Any, field: str, where: str) -> bytes:
    """Return the text of one record, a dict.

    Raises:
      ValueError: there is no text in `field`; the message begins with `where`.
    """
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(
            f"{where}: the record must be an object with the field {short_repr(field)}; "
            f"got a JSON {kind}."
        )
    if field not in record:
        names = short_list(record) or "none"
        raise ValueError(
            f"{where}: there is no field {short_repr(field)} (found: {names}); type "
            "--text_field=NAME for the field with the text."
        )
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise ValueError(
            f"{where}: the field {short_repr(field)} must be a string; got type {kind}."
        )
    try:
        return record[field].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: the field {short_repr(field)} must be valid Unicode; got half a surrogate "
            f"pair ({error})."
        ) from error


def check_size(size: int, what: str) -> None:
    """Raise ValueError if a document that is to be held in memory is too large."""
    if size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{what} must have at most {MAX_DOCUMENT_BYTES:,} bytes, but has more; split it, or "
            "store it as a .txt file, which may have any size."
        )


def read_json_lines(path: Place, file: BinaryIO, field: str) -> Iterator[Document]:
    """Yield a document for each line of a .jsonl, .jsonl.gz or .jsonl.zst file that is not blank.

    Args:
      path: the file's path, whose suffix decides how it is decompressed.
      file: the open file.
      field: the field with the text.

    Raises:
      ValueError: a line is malformed or too long, or the file is damaged.
    """
    stream: io.BufferedIOBase | BinaryIO = file
    if path.name.lower().endswith(".gz"):
        stream = gzip.GzipFile(fileobj=file)
    elif path.name.lower().endswith(".zst"):
        stream = io.BufferedReader(ZstdFile(file), 1 << 17)
    number = 0
    while True:
        try:
            line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged or truncated after line {number}: {error}."
            ) from error
        if not line:
            return
        number += 1
        where = f"{path}, line {number}"
        check_size(len(line), where)
        check_utf8(line, str(path), number)
        text = line.decode("utf-8-sig").strip(" \t\r\n")
        if text:
            yield Document(where, text_of(json_text.loads(text, where), field, where))


def read_parquet(path: Place, file: BinaryIO, field: str) -> Iterator[Document]:
    """Yield a document for each row of a .parquet file, with one page in memory at a time.

    Args:
      path: the file's path.
      file: the open file.
      field: the column with the text.

    Raises:
      ValueError: there is no such column, a row is not text or too long, or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "A .parquet file needs the package 'pyarrow': pip install pyarrow"
        ) from error
    damaged = f"{path}: damaged"
    with errors_as_value_error(damaged):
        table = pyarrow.parquet.ParquetFile(file)
        schema = table.schema_arrow
    if field not in schema.names:
        raise ValueError(
            f"{path}: there is no column {short_repr(field)} (found: {short_list(schema.names)}); "
            "type --text_field=NAME for the column with the text."
        )
    with errors_as_value_error(damaged):
        # A value that the file stores once for many rows is also held once.
        dictionary = [field] if pyarrow.types.is_string(schema.field(field).type) else None
        table = pyarrow.parquet.ParquetFile(
            file, metadata=table.metadata, read_dictionary=dictionary, buffer_size=1 << 20
        )
        groups = range(table.metadata.num_row_groups)
    number = 0
    for group in groups:
        with errors_as_value_error(f"{path}: damaged after row {number}"):
            rows, size = _group_size(table.metadata.row_group(group), field)
            mean_size = max(0, size - (1 << 20)) // max(rows, 1)  # leaves 1 MiB for page headers
        # The check precedes reading because whole pages are decompressed.
        check_size(
            mean_size, f"{path}, rows {number + 1} to {number + rows}: field {field!r} of each"
        )
        batches = table.iter_batches(
            batch_size=max(1, min(1024, MAX_DOCUMENT_BYTES * rows // max(size, 1))),
            row_groups=[group],
            columns=[field],
        )
        for batch in iterate(batches, f"{path}: damaged in the {rows} rows after row {number}"):
            for cell in batch.column(0):
                number += 1
                where = f"{path}, row {number}"
                with errors_as_value_error(f"{where}: damaged"):
                    cell = cell.value if isinstance(cell, pyarrow.DictionaryScalar) else cell
                    is_text = isinstance(cell, pyarrow.StringScalar | pyarrow.LargeStringScalar)
                    raw = cell.as_buffer() if is_text and cell.is_valid else None
                if raw is None:
                    with errors_as_value_error(f"{where}: damaged"):
                        value = cell.as_py()
                    text = text_of({field: value}, field, where)
                else:
                    check_size(raw.size, f"{where}, field {field!r}")
                    text = raw.to_pybytes()
                    check_utf8(text, where, 1)
                yield Document(where, text)


def _group_size(group: Any, field: str) -> tuple[int, int]:
    """Return a row group's number of rows, and a bound on a column's bytes, decompressed.

    The bound is the whole group's size, or the column's if the rows are large. The column's
    metadata is read only then: if it is damaged, the library ends the process.
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
