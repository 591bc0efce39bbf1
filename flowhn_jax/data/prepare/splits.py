"""From parts to the splits of a set: documents to windows to shards, each shard on its own.

The stream of a split is known from the lengths of its documents alone, so each shard can be packed
from the parts that hold its tokens, by any process.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np

from flowhn_jax.data.packing import Packer
from flowhn_jax.data.prepare.holdout import is_held_out
from flowhn_jax.data.prepare.parts import Part, PartList
from flowhn_jax.data.prepare.workers import Workers
from flowhn_jax.data.prepared import Split
from flowhn_jax.data.shards import Shard, ShardWriter, windows_per_shard
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.utils.progress import Progress

_SPLITS = ("train", "validation")
_WINDOWS_PER_WRITE = 1024


@dataclasses.dataclass(frozen=True)
class Form:
    """What determines the windows of a set, in addition to its parts.

    Attributes:
      context: N; windows have N+1 tokens.
      frame: the number of special tokens between two documents: EOT, or EOT and BOS.
      token_dtype, segment_dtype: the data types in the records.
      fraction: the share of the documents to hold out.
    """

    context: int
    frame: int
    token_dtype: str
    segment_dtype: str
    fraction: float


@dataclasses.dataclass(frozen=True)
class _Task:
    """A shard to write.

    The raw stream of a split is `frame` special tokens and the ids of each document. The stream
    that is packed lacks the first token of the raw stream if that is EOT before BOS, and ends with
    EOT.

    Attributes:
      path: the file.
      split: 'train' or 'validation'.
      documents: the number of all documents.
      part: the number of the part that holds the shard's first token.
      documents_before: the number of documents that begin in earlier parts.
      skipped: the tokens of the raw stream in this part that come before the first one.
      windows: the number of windows.
    """

    path: pathlib.Path
    split: str
    documents: int
    part: int
    documents_before: int
    skipped: int
    windows: int


@dataclasses.dataclass
class _Plan:
    """A split as far as its parts were counted: the sums over its documents, and its shards.

    `starts` holds the values of `_Task.part`, `documents_before` and `skipped` of each shard.
    """

    ids: int = 0
    bytes: int = 0
    documents: int = 0
    starts: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def raw_length(self, form: Form) -> int:
        """Return the tokens of the raw stream so far."""
        return self.ids + form.frame * self.documents

    def windows(self, form: Form) -> int:
        """Return the number of windows, which start every N tokens before the last EOT."""
        return -(-(self.raw_length(form) - form.frame + 1) // form.context)


def write_splits(
    folder: pathlib.Path, form: Form, parts: PartList, workers: Workers[Tokenizer]
) -> dict[str, Split]:
    """Write the shards of a set and return its splits by name.

    Args:
      folder: the folder for the shards.
      form: the form of the set.
      parts: the ids of all documents.
      workers: the processes that pack.

    Raises:
      OSError: a shard cannot be written.
    """
    per_shard = windows_per_shard(form.context, form.token_dtype, form.segment_dtype)
    documents = sum(int(part.starts.sum()) for part in parts.without_ids())
    plans = _plan(form, parts, documents, per_shard)
    tasks = [
        _Task(
            folder / f"{name}-{number:05d}.array_record",
            name,
            documents,
            *start,
            min(per_shard, plan.windows(form) - number * per_shard),
        )
        for name, plan in plans.items()
        for number, start in enumerate(plan.starts)
    ]
    shards: dict[str, list[Shard]] = {name: [] for name in plans}
    written = workers.map(_write_shard, ((task, form, parts) for task in tasks))
    with Progress(sum(task.windows for task in tasks), "packing", "windows") as bar:
        for task, shard in zip(tasks, written, strict=True):
            shards[task.split].append(shard)
            bar.update(shard.records)
    return {
        name: Split(
            windows=plan.windows(form),
            tokens=plan.ids + plan.documents,  # with end-of-text after each document
            bytes=plan.bytes,
            documents=plan.documents,
            shards=tuple(shards[name]),
        )
        for name, plan in plans.items()
    }


def _plan(form: Form, parts: PartList, documents: int, per_shard: int) -> dict[str, _Plan]:
    """Return the plans of both splits, whose shards hold `per_shard` windows each."""
    plans = {name: _Plan() for name in _SPLITS}
    before = 0  # documents
    for number, part in enumerate(parts.without_ids()):
        for name, plan in plans.items():
            rows = _rows(form, name, part, before, documents)
            start = plan.raw_length(form)
            plan.ids += int(part.lengths[rows].sum())
            plan.bytes += int(part.sizes[rows].sum())
            plan.documents += int(part.starts[rows].sum())
            stop = plan.raw_length(form)
            while (first := len(plan.starts) * per_shard * form.context + form.frame - 1) < stop:
                plan.starts.append((number, before, first - start))
        before += int(part.starts.sum())
    return plans


def _rows(form: Form, split: str, part: Part, before: int, documents: int) -> np.ndarray:
    """Return which chunks of a part belong to a split: bool [chunks].

    Args:
      form: the form of the set.
      split: 'train' or 'validation'.
      part: the part.
      before: the number of documents that begin in earlier parts.
      documents: the number of all documents.
    """
    held_out = is_held_out(before + np.cumsum(part.starts), documents, form.fraction)
    return held_out if split == "validation" else ~held_out


def _write_shard(tokenizer: Tokenizer, task: _Task, form: Form, parts: PartList) -> Shard:
    """Write a shard."""
    bos_id = tokenizer.first_ids[0] if form.frame == 2 else None
    packer = Packer(form.context, tokenizer.eot_id, bos_id)
    writer = ShardWriter(task.path, form.token_dtype, form.segment_dtype)
    left = task.windows

    def write(tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        nonlocal left
        writer.write(tokens[:left], segment_ids[:left])
        left -= min(left, len(tokens))

    for starts_document, ids in _from_first_token(task, form, parts, packer):
        if starts_document:
            packer.start_document()
        packer.add(ids)
        if packer.complete_windows >= min(left, _WINDOWS_PER_WRITE):
            write(*packer.take())
            if not left:
                return writer.close()
    write(*packer.finish())
    return writer.close()


def _from_first_token(
    task: _Task, form: Form, parts: PartList, packer: Packer
) -> Iterator[tuple[bool, np.ndarray]]:
    """Yield the chunks from the shard's first token on: whether each begins a document, its ids.

    `packer` continues the document that the first token is in the middle of, if any.
    """
    chunks = _chunks(task, form, parts)
    skipped = task.skipped
    for starts_document, ids in chunks:
        frame = form.frame if starts_document else 0
        if skipped >= frame + len(ids):
            skipped -= frame + len(ids)
            continue
        if frame - skipped == 1:  # the token that begins a stream
            yield True, ids
        elif frame > skipped:  # end-of-text of the document before
            packer.continue_document()
            yield True, ids
        else:
            packer.continue_document()
            yield False, ids[skipped - frame :]
        break
    yield from chunks


def _chunks(task: _Task, form: Form, parts: PartList) -> Iterator[tuple[bool, np.ndarray]]:
    """Yield the chunks of a split, from the beginning of a shard's first part on."""
    before = task.documents_before
    for number in range(task.part, len(parts)):
        part = parts[number]
        ends = np.cumsum(part.lengths)
        for row in np.flatnonzero(_rows(form, task.split, part, before, task.documents)):
            ids = part.ids[ends[row] - part.lengths[row] : ends[row]]
            yield bool(part.starts[row]), ids.astype(np.int32)
        before += int(part.starts.sum())
