"""Preparing a set: from the arguments to a complete folder.

Documents become parts, and parts become shards (see `parts` and `splits`). Both steps are done by
several processes, and the first by several hosts. Parts are kept until the set is complete, so a
preparation that was killed continues.
"""

import dataclasses
import pathlib
import re
import sys
from typing import Any

from flowhn_jax.data.prepare import parts as parts_lib
from flowhn_jax.data.prepare.exchange import Exchange
from flowhn_jax.data.prepare.existing import holds_same_set
from flowhn_jax.data.prepare.holdout import warn_about_holdout
from flowhn_jax.data.prepare.splits import Form, write_splits
from flowhn_jax.data.prepare.upload import is_unfinished, local_folder, remove_traces, upload
from flowhn_jax.data.prepare.workers import WorkerKilledError, Workers
from flowhn_jax.data.prepared import TOKENIZER, PreparedSet
from flowhn_jax.data.shards import unsigned_dtype
from flowhn_jax.data.sources import Source, open_source
from flowhn_jax.data.staging import kept_folder, publish, remove_if_empty, staging_folder
from flowhn_jax.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from flowhn_jax.storage import AnyPath, Place, place
from flowhn_jax.utils.files import sync
from flowhn_jax.utils.limits import MAX_POSITIONS
from flowhn_jax.utils.text import short_list, short_repr

_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)


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
    shard: str = "0/1",
    overwrite: bool = False,
) -> PreparedSet:
    """Prepare a set, or open the set at `out` if it was prepared with the same arguments.

    Of every k documents, k = 1 / validation_fraction rounded, the last is held out for validation;
    of fewer than k documents, the last one; of a single document, its end. A warning on stderr
    reports if the held-out share of the text is far from the requested one, or too small to
    measure a loss.

    Memory holds one document at a time and a few groups of 4 MiB for each worker, so the text may
    have any size, but a line of a .jsonl file and the text of a row at most 64 MiB
    (`document.MAX_DOCUMENT_BYTES`); for a .parquet file, memory also holds the current page. A .txt
    file is read in chunks and may have any size.

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
      workers: the number of processes that tokenize and pack, which does not affect the result. For
        more than 1, the calling script needs multiprocessing's `if __name__ == "__main__"`.
      shard: 'I/N', if N processes or hosts that share `out` prepare one set, each with another I
        from 0 to N-1. The last one to finish makes the set, with the same result as one process.
      overwrite: replace a different or damaged set at `out`.

    Raises:
      ValueError: an argument is out of range, the text cannot be read, a document is too long, the
        source changes during the preparation, `out` is taken, or the shards differ.
      OSError: a file cannot be found, read or written.
      ImportError: a package that this source or tokenizer needs is missing.
      ShardsMissing: the shard is complete, but other shards are not.
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
    out, parsed_shard = place(out), parse_shard(shard)
    opened = open_source(source, text_field)
    if first_token == "none":
        raise ValueError("first_token must be auto, bos or eot to prepare data; got 'none'.")
    loaded = load_tokenizer(tokenizer, eot_token, first_token=first_token)
    job = _Job(
        source,
        opened,
        tokenizer,
        loaded,
        workers,
        parsed_shard,
        {
            "source": opened.identity,
            "tokenizer": loaded.fingerprint,
            "context": context,
            "validation_fraction": validation_fraction,
            "text_field": text_field,
            "first_token": loaded.first_token,
        },
    )
    if out.is_remote:
        prepared = _make_in_bucket(out, job, overwrite)
    else:
        prepared = _make(out.local().resolve(), job, overwrite)
    warn_about_holdout(prepared.splits, validation_fraction)
    return prepared


class ShardsMissing(Exception):
    """This shard of a preparation is complete, but others are not, so there is no set yet."""


def parse_shard(text: str) -> tuple[int, int]:
    """Return I and N of a shard 'I/N'.

    Raises:
      ValueError: the text is not of the form I/N.
    """
    found = _SHARD.fullmatch(text)
    index, count = map(int, found.groups()) if found else (0, 0)
    if index >= count:
        raise ValueError(
            "shard must be I/N with I from 0 to N-1, for example 0/4 on the first of four hosts; "
            f"got {short_repr(text)}."
        )
    return index, count


@dataclasses.dataclass(frozen=True)
class _Job:
    """A preparation, checked and ready to be done.

    Attributes:
      source_spec: the source as given.
      source: the documents.
      tokenizer_spec: the tokenizer as given.
      tokenizer: the tokenizer.
      workers: the number of processes.
      shard: I and N: which parts this process makes.
      request: see `PreparedSet.request`.
    """

    source_spec: str
    source: Source
    tokenizer_spec: str
    tokenizer: Tokenizer
    workers: int
    shard: tuple[int, int]
    request: dict[str, Any]

    def write_parts(self, folder: pathlib.Path, workers: Workers[Tokenizer]) -> None:
        """Make the parts of this shard that are missing in its folder."""
        parts_lib.keep_parts_of(folder, self.request, self.source.is_reproducible)
        if parts_lib.count_if_complete(folder, self.request) is None:
            fraction = self.request["validation_fraction"]
            total = parts_lib.write_parts(
                self.source, self.tokenizer, fraction, folder, workers, self.shard
            )
            parts_lib.mark_complete(folder, total)

    def write_set(
        self, folder: pathlib.Path, parts: parts_lib.PartList, workers: Workers[Tokenizer]
    ) -> None:
        """Write the set of all shards' parts to an empty folder."""
        tokenizer, context = self.tokenizer, self.request["context"]
        if isinstance(tokenizer, HuggingFaceTokenizer):
            (folder / TOKENIZER).write_text(tokenizer.json, encoding="utf-8")
            sync(folder / TOKENIZER)
        form = Form(
            context=context,
            frame=2 if tokenizer.first_token == "bos" else 1,
            token_dtype=unsigned_dtype(tokenizer.vocab_size),
            segment_dtype=unsigned_dtype(context + 2),
            fraction=self.request["validation_fraction"],
        )
        PreparedSet(
            folder=place(folder),
            source=self.source_spec,
            request=self.request,
            tokenizer_spec=self.tokenizer_spec,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            eot_token=tokenizer.eot_token,
            context=context,
            token_dtype=form.token_dtype,
            segment_dtype=form.segment_dtype,
            splits=write_splits(folder, form, parts, workers),
            first_token=tokenizer.first_token,
            bos_token=tokenizer.bos_token,
        ).write_index()


def _make(
    out: pathlib.Path, job: _Job, overwrite: bool, exchange: Exchange | None = None
) -> PreparedSet:
    """Return the set of a job in a local folder, where it is made if it is not there.

    After Ctrl-C, or if the process or a worker is killed, the parts are kept for the next call.

    Args:
      out: the folder.
      job: the preparation.
      overwrite: whether a different set at `out` may be replaced.
      exchange: the other shards' parts, where they are not next to `out`.

    Raises:
      ShardsMissing: it cannot be made before other shards are complete.
    """
    index, count = job.shard
    folders = tuple(out.with_name(f".{out.name}.parts-{i}-of-{count}") for i in range(count))
    with kept_folder(folders[index], out) as own:
        try:
            if not _is_there(place(out), job.request, overwrite):
                with Workers(job.workers, job.tokenizer) as workers:
                    if exchange is None or not exchange.has(index):
                        job.write_parts(own, workers)
                    if exchange is not None:
                        exchange.send(index, own)
                        exchange.fetch(folders)
                    _make_of_parts(out, job, overwrite, folders, workers)
                for folder in folders:
                    parts_lib.remove_parts(folder)
                    remove_if_empty(folder)
        except KeyboardInterrupt as error:
            message = "interrupted; the same command continues the preparation."
            raise KeyboardInterrupt(message) from error
        except WorkerKilledError:
            raise
        except ShardsMissing:
            for folder in folders if exchange is not None else ():  # all are in the bucket
                parts_lib.remove_parts(folder)
                remove_if_empty(folder)
            raise
        except BaseException:
            parts_lib.remove_parts(own)
            raise
        parts_lib.remove_parts(own)
    return PreparedSet.open(out)


def _make_of_parts(
    out: pathlib.Path,
    job: _Job,
    overwrite: bool,
    folders: tuple[pathlib.Path, ...],
    workers: Workers[Tokenizer],
) -> None:
    """Make the set of the parts in the folders of all shards, unless another shard has made it."""
    with staging_folder(out) as folder:
        if _is_there(place(out), job.request, overwrite):
            return
        totals = [parts_lib.count_if_complete(each, job.request) for each in folders]
        missing = [f"{i}/{len(folders)}" for i, total in enumerate(totals) if total is None]
        if missing:
            raise ShardsMissing(
                f"Shard {job.shard[0]}/{job.shard[1]} of {out} is complete. The set is made when "
                f"all are; missing are {short_list(missing)}."
            )
        assert totals[0] is not None
        job.write_set(folder, parts_lib.PartList(folders, totals[0]), workers)
        publish(folder, out)


def _make_in_bucket(out: Place, job: _Job, overwrite: bool) -> PreparedSet:
    """Return the set of a job in a bucket: made in a local folder, and uploaded."""
    count = job.shard[1]
    exchange = Exchange(out, count) if count > 1 else None
    with local_folder(out, job.shard) as folder:
        if not is_unfinished(out) and _is_there(out, job.request, overwrite):
            remove_traces(folder, out)  # of an upload that was killed after its last object
        else:
            try:
                upload(_make(folder, job, True, exchange), out)
            except FileNotFoundError:  # another shard has made the set and removed the parts
                if exchange is None or not _is_there(out, job.request, overwrite):
                    raise
        if exchange is not None:
            exchange.remove()
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
