"""Text to token windows on disk: `python -m flowhn_jax.data.prepare --help`.

What is prepared is complete or absent, see `unfinished`.
"""

import collections
import contextlib
import itertools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tqdm

from flowhn_jax.data import borders
from flowhn_jax.data.document import Document
from flowhn_jax.data.encoding import Piece, encode
from flowhn_jax.data.packing import Packer
from flowhn_jax.data.prepared import TOKENIZER, VERSION, PreparedSet, Split, read_index
from flowhn_jax.data.shards import ShardWriter, unsigned_dtype
from flowhn_jax.data.sources import Source, open_source
from flowhn_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from flowhn_jax.data.unfinished import publish, unfinished_folder
from flowhn_jax.utils.files import sync
from flowhn_jax.utils.limits import MAX_POSITIONS
from flowhn_jax.utils.text import short_repr

_SECONDS_BETWEEN_LINES = 10
_MIN_VALIDATION_TOKENS = 1000
_MAX_SHARE_RATIO = 2  # between the share of the text that is held out and the one asked for


def prepare(
    source: str,
    tokenizer: str,
    out: str | os.PathLike,
    *,
    context: int = 1024,
    validation_fraction: float = 0.01,
    text_field: str = "text",
    eot_token: str | None = None,
    first_token: str = "auto",
    workers: int = 1,
    overwrite: bool = False,
) -> PreparedSet:
    """Prepares a set, or opens the one that an equal call has left at `out`.

    Of every k documents, k = 1 / validation_fraction rounded, the last is held out for validation;
    of fewer than k in all, the last one; of a single one, its end. A warning on stderr says where
    much more or less than the asked share of the text, or too little to measure, is held out.

    Documents are held in memory one at a time, so that a line of a .jsonl file and a row's text may
    have at most 64 MiB (`document.MAX_DOCUMENT_BYTES`), plus the page of a .parquet file that it is
    in. A .txt file is read in pieces, and may be of any size.

    Args:
      source: see `sources.open_source`.
      tokenizer: see `tokenizer.load_tokenizer`.
      out: the folder to make.
      context: N; windows have N+1 tokens.
      validation_fraction: share of the documents to hold out, above 0 and at most 0.5.
      text_field: field or column that holds the text of .jsonl and .parquet sources.
      eot_token: end-of-text token of a Hugging Face tokenizer that has none of the usual ones.
      first_token: what each document begins with, see `tokenizer.load_tokenizer`: 'auto', 'bos' or
        'eot'. Each ends with end-of-text.
      workers: processes that tokenize; the set is the same for any number. Above 1, the calling
        script needs the `if __name__ == "__main__"` of multiprocessing.
      overwrite: replace a set at `out` that is a different one, or damaged.

    Raises:
      ValueError: an argument out of range, text that cannot be read, a document that is too long,
        files of the source that change meanwhile, or an `out` that is in use.
      OSError: files that cannot be found, read or written.
      ImportError: a package that this source or tokenizer needs is missing.
    """
    if not 1 <= context <= MAX_POSITIONS:
        raise ValueError(f"context is {context}; accepted is 1 to {MAX_POSITIONS}.")
    if not 0 < validation_fraction <= 0.5:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; accepted is above 0, at most 0.5."
        )
    if workers < 1:
        raise ValueError(f"workers is {workers}; accepted is 1 or more.")
    if not os.fspath(out):
        raise ValueError("out is ''; accepted is the folder to make.")
    out = pathlib.Path(out).resolve()
    opened = open_source(source, text_field)
    if first_token == "none":
        raise ValueError("first_token must be auto, bos or eot where data is prepared; got 'none'.")
    loaded = load_tokenizer(tokenizer, eot_token, first_token=first_token)
    request = {
        "source": opened.identity,
        "tokenizer": loaded.fingerprint,
        "context": context,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "first_token": loaded.first_token,
    }
    with unfinished_folder(out) as folder:
        if _holds_equal_set(out, request, overwrite):
            print(f"{out} is already prepared from the same source; using it.", file=sys.stderr)
            prepared = PreparedSet.open(out)
            _warn_of_validation(prepared.splits, validation_fraction)
            return prepared
        token_dtype, segment_dtype = unsigned_dtype(loaded.vocab_size), unsigned_dtype(context + 2)
        if isinstance(loaded, HuggingFaceTokenizer):
            (folder / TOKENIZER).write_text(loaded.json, encoding="utf-8")
            sync(folder / TOKENIZER)
        writers = {
            name: ShardWriter(folder, name, token_dtype, segment_dtype)
            for name in ("train", "validation")
        }
        splits = _write_splits(opened, loaded, context, validation_fraction, workers, writers)
        PreparedSet(
            folder=folder,
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
        publish(folder, out)
    _warn_of_validation(splits, validation_fraction)
    return PreparedSet.open(out)


def ensure_embedded(out: str | os.PathLike, context: int) -> PreparedSet:
    """The embedded corpus as bytes at `out`, prepared unless it is there already.

    A set that another version of Python has left there is used as it is, so that a training run
    goes on with its own data after an upgrade.

    Raises:
      ValueError, OSError: see `prepare`.
    """
    out = pathlib.Path(out)
    if out.is_dir() and any(out.iterdir()):
        found = PreparedSet.open(out)
        if (found.source, found.tokenizer_spec, found.context) == ("embedded", "bytes", context):
            return found
    return prepare("embedded", "bytes", out, context=context, validation_fraction=0.04)


def _write_splits(
    source: Source,
    tokenizer: Tokenizer,
    context: int,
    validation_fraction: float,
    workers: int,
    writers: dict[str, ShardWriter],
) -> dict[str, Split]:
    bos_id = tokenizer.first_ids[0] if tokenizer.first_token == "bos" else None
    packers = {name: Packer(context, tokenizer.eot_id, bos_id) for name in writers}
    text_bytes = collections.Counter()
    windows = collections.Counter()

    def write(name: str, taken: tuple[np.ndarray, np.ndarray]) -> None:
        windows[name] += len(taken[0])
        writers[name].write(*taken)

    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(_progress(source.size))
        documents = _assign(source.read(advance), validation_fraction)
        pieces = _pieces(tokenizer, documents)
        groups = stack.enter_context(contextlib.closing(encode(tokenizer, pieces, workers)))
        for group in groups:
            for piece, ids in group:
                if piece.starts:
                    packers[piece.split].start_document()
                packers[piece.split].add(ids)
                text_bytes[piece.split] += len(piece.text)
            for name, packer in packers.items():
                write(name, packer.take())
    source.check_unchanged()
    for name, packer in packers.items():
        write(name, packer.finish())
    return {
        name: Split(
            windows[name],
            packer.targets,
            text_bytes[name],
            packer.documents,
            writers[name].close(),
        )
        for name, packer in packers.items()
    }


def _warn_of_validation(splits: dict[str, Split], asked: float) -> None:
    """Print a warning where the validation set is not what was asked for, or of no use."""
    held_out = splits["validation"]
    share = held_out.bytes / (splits["train"].bytes + held_out.bytes)
    documents = f"{held_out.documents:,} document{'s' * (held_out.documents > 1)}"
    found = (
        f"held out for validation: {documents}, {held_out.tokens:,} tokens, {share:.2g} of the text"
    )
    if held_out.tokens < _MIN_VALIDATION_TOKENS:
        needed = share * _MIN_VALIDATION_TOKENS / held_out.tokens
        advice = "prepare more text"
        if needed <= 0.5 and asked < 0.5:
            fraction = min(0.5, 2 * max(needed, asked))
            advice = f"type --validation_fraction={_rounded(fraction)}, or {advice}"
        print(
            f"warning: {found}; a validation loss needs at least {_MIN_VALIDATION_TOKENS:,} "
            f"tokens: {advice}.",
            file=sys.stderr,
        )
    elif not asked / _MAX_SHARE_RATIO <= share <= asked * _MAX_SHARE_RATIO:
        print(
            f"warning: {found}, where --validation_fraction={asked:g} asks for {asked:.2g}; only "
            "whole documents or lines are held out: prepare more and shorter documents, or type "
            f"--validation_fraction={_rounded(min(share, 0.5))} if this share is right.",
            file=sys.stderr,
        )


def _rounded(fraction: float) -> str:
    """Return a fraction, not rounded down, as one would type it."""
    digits = max(2, 1 - math.floor(math.log10(fraction)))
    return f"{math.ceil(fraction * 10**digits - 1e-9) / 10**digits:g}"


def _assign(documents: Iterator[Document], fraction: float) -> Iterator[tuple[str, Document]]:
    """Each document with the split that it belongs to."""
    first, second = next(documents, None), next(documents, None)
    if first is None:
        raise ValueError("The source holds no text.")
    if second is None:
        yield from zip(("train", "validation"), first.halves(fraction), strict=True)
        return
    period = round(1 / fraction)
    held_out = False
    following = itertools.chain([second], documents, [None])
    document = first
    for number, after in enumerate(following, 1):
        if number % period == 0 or (after is None and not held_out):
            held_out = True
            yield "validation", document
        else:
            yield "train", document
        document = after


def _pieces(tokenizer: Tokenizer, documents: Iterable[tuple[str, Document]]) -> Iterator[Piece]:
    for split, document in documents:
        for number, (before, text) in enumerate(borders.split(tokenizer, document)):
            yield Piece(split, number == 0, text, before, document.name)


def _holds_equal_set(out: pathlib.Path, request: dict, overwrite: bool) -> bool:
    """Whether `out` is a set of this request; False where `out` may be written.

    Raises:
      ValueError: `out` is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = read_index(out)
    except ValueError as error:
        raise ValueError(f"{out} exists and is left alone: {error}") from error
    there = {"version": found.get("version"), "first_token": "eot"} | found["request"]
    wanted = {"version": VERSION} | request
    if there != wanted:
        if overwrite:
            return False
        differences = "; ".join(
            f"{key} {short_repr(there.get(key))} there, {short_repr(value)} asked for"
            for key, value in wanted.items()
            if there.get(key) != value
        )
        as_there = ""
        if there | {"first_token": wanted["first_token"]} == wanted:
            as_there = f"--first_token={there['first_token']} for the set that is there, or "
        raise ValueError(
            f"{out} holds another prepared set ({differences}); choose another folder, or type "
            f"{as_there}--overwrite."
        )
    try:
        PreparedSet.open(out).verify()
    except ValueError as error:
        if overwrite:
            return False
        raise ValueError(f"{error} Say --overwrite to prepare it again.") from error
    return True


@contextlib.contextmanager
def _progress(size: int | None) -> Iterator[Callable[[int], None]]:
    """What to tell how many bytes of the source were read: a bar on a terminal, or else lines."""
    if sys.stderr.isatty():
        with tqdm.tqdm(total=size, unit="B", unit_scale=True, desc="preparing") as bar:
            yield bar.update
        return
    read, last = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal read, last
        read += count
        if time.monotonic() > last + _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            share = f" of {size / 1e6:,.1f} MB ({read / size:.0%})" if size else " MB"
            print(f"preparing: read {read / 1e6:,.1f}{share}", file=sys.stderr, flush=True)

    yield advance
