"""Preparing a set: from the arguments to a complete folder (see `data.staging`)."""

import pathlib
import sys
from collections.abc import Callable
from typing import Any

from flowhn_jax.data.prepare.existing import holds_same_set
from flowhn_jax.data.prepare.holdout import warn_about_holdout
from flowhn_jax.data.prepare.splits import split_writers, write_splits
from flowhn_jax.data.prepare.upload import is_unfinished, local_folder, remove_traces, upload
from flowhn_jax.data.prepared import TOKENIZER, PreparedSet
from flowhn_jax.data.shards import unsigned_dtype
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.staging import publish, staging_folder
from flowhn_jax.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from flowhn_jax.storage import AnyPath, Place, place
from flowhn_jax.utils.files import sync
from flowhn_jax.utils.limits import MAX_POSITIONS

_Write = Callable[[pathlib.Path], None]  # writes a set to an empty folder


def prepare(
    source: str,
    tokenizer: str,
    out: AnyPath,
    *,
    context: int = 1024,
    validation_fraction: float = 0.01,
    text_field: str = "text",
    eot_token: str | None = None,
    first_token: str = "auto",
    workers: int = 1,
    overwrite: bool = False,
) -> PreparedSet:
    """Prepare a set, or open the set at `out` if it was prepared with the same arguments.

    Of every k documents, k = 1 / validation_fraction rounded, the last is held out for validation;
    of fewer than k documents, the last one; of a single document, its end. A warning on stderr
    reports if the held-out share of the text is far from the requested one, or too small to
    measure a loss.

    One document is held in memory at a time, so a line of a .jsonl file and the text of a row must
    have at most 64 MiB (`document.MAX_DOCUMENT_BYTES`); for a .parquet file, memory also holds the
    current page. A .txt file is read in chunks and may have any size.

    Args:
      source: the text, see `sources.open_source`.
      tokenizer: the tokenizer, see `tokenizer.load_tokenizer`.
      out: the folder to write; for one in a bucket see `upload`.
      context: N; windows have N+1 tokens.
      validation_fraction: the share of the documents to hold out, above 0 and at most 0.5.
      text_field: the field or column with the text in .jsonl and .parquet sources.
      eot_token: the end-of-text token of a Hugging Face tokenizer without any of the usual ones.
      first_token: what each document begins with: 'auto', 'bos' or 'eot', see
        `tokenizer.load_tokenizer`. Each document ends with end-of-text.
      workers: the number of processes that tokenize, which does not affect the result. For more
        than 1, the calling script needs multiprocessing's `if __name__ == "__main__"`.
      overwrite: replace a different or damaged set at `out`.

    Raises:
      ValueError: an argument is out of range, the text cannot be read, a document is too long, the
        source changes during the preparation, or `out` is taken.
      OSError: a file cannot be found, read or written.
      ImportError: a package that this source or tokenizer needs is missing.
    """
    if not 1 <= context <= MAX_POSITIONS:
        raise ValueError(f"context must be from 1 to {MAX_POSITIONS}; got {context}.")
    if not 0 < validation_fraction <= 0.5:
        raise ValueError(
            f"validation_fraction must be above 0 and at most 0.5; got {validation_fraction}."
        )
    if workers < 1:
        raise ValueError(f"workers must be 1 or more; got {workers}.")
    if not str(out):
        raise ValueError("out must be the folder to write; got ''.")
    out = place(out)
    opened = open_source(source, text_field)
    if first_token == "none":
        raise ValueError("first_token must be auto, bos or eot to prepare data; got 'none'.")
    loaded = load_tokenizer(tokenizer, eot_token, first_token=first_token)
    request: dict[str, Any] = {
        "source": opened.identity,
        "tokenizer": loaded.fingerprint,
        "context": context,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "first_token": loaded.first_token,
    }

    def write(folder: pathlib.Path) -> None:
        if isinstance(loaded, HuggingFaceTokenizer):
            (folder / TOKENIZER).write_text(loaded.json, encoding="utf-8")
            sync(folder / TOKENIZER)
        token_dtype, segment_dtype = unsigned_dtype(loaded.vocab_size), unsigned_dtype(context + 2)
        writers = split_writers(folder, loaded, context, (token_dtype, segment_dtype))
        splits = write_splits(opened, loaded, validation_fraction, workers, writers)
        PreparedSet(
            folder=place(folder),
            source=source,
            request=request,
            tokenizer_spec=tokenizer,
            tokenizer_fingerprint=loaded.fingerprint,
            vocab_size=loaded.vocab_size,
            eot_id=loaded.eot_id,
            eot_token=loaded.eot_token,
            context=context,
            token_dtype=token_dtype,
            segment_dtype=segment_dtype,
            splits=splits,
            first_token=loaded.first_token,
            bos_token=loaded.bos_token,
        ).write_index()

    if out.is_remote:
        prepared = _make_in_bucket(out, request, overwrite, write)
    else:
        prepared = _make(out.local().resolve(), request, overwrite, write)
    warn_about_holdout(prepared.splits, validation_fraction)
    return prepared


def _make(
    out: pathlib.Path, request: dict[str, Any], overwrite: bool, write: _Write
) -> PreparedSet:
    """Return the set of this request in a local folder, which `write` fills if it is not there."""
    with staging_folder(out) as folder:
        if _is_there(place(out), request, overwrite):
            return PreparedSet.open(out)
        write(folder)
        publish(folder, out)
    return PreparedSet.open(out)


def _make_in_bucket(
    out: Place, request: dict[str, Any], overwrite: bool, write: _Write
) -> PreparedSet:
    """Return the set of this request in a bucket: made in a local folder, and uploaded."""
    with local_folder(out) as folder:
        if not is_unfinished(out) and _is_there(out, request, overwrite):
            remove_traces(folder, out)  # of an upload that was killed after its last object
        else:
            upload(_make(folder, request, True, write), out)
    return PreparedSet.open(out)


def _is_there(out: Place, request: dict[str, Any], overwrite: bool) -> bool:
    """Return what `holds_same_set` returns, and print that the set is used."""
    found = holds_same_set(out, request, overwrite)
    if found:
        print(f"Using {out}, which was already prepared from this source.", file=sys.stderr)
    return found


def ensure_embedded(out: AnyPath, context: int) -> PreparedSet:
    """Return the embedded corpus as bytes at `out`, and prepare it if it is not there yet.

    A set that another version of Python prepared there is used unchanged, so that a training run
    continues with its own data after an upgrade.

    Raises:
      ValueError, OSError: see `prepare`.
    """
    out = place(out)
    if out.children() and not (out.is_remote and is_unfinished(out)):
        found = PreparedSet.open(out)
        if (found.source, found.tokenizer_spec, found.context) == ("embedded", "bytes", context):
            return found
    return prepare("embedded", "bytes", out, context=context, validation_fraction=0.04)
