"""The text that a comparison trains on: a corpus that needs no network, and recall texts."""

import itertools
import os
from collections.abc import Iterable, Iterator

from flowhn_jax.data.bpe import train_bpe
from flowhn_jax.data.packages_corpus import package_documents
from flowhn_jax.data.prepare import ensure_embedded, prepare
from flowhn_jax.data.prepared import INDEX, TOKENIZER, PreparedSet
from flowhn_jax.data.synthetic import TASKS, write
from flowhn_jax.evaluation.recall import characters_for
from flowhn_jax.storage import Place, place
from flowhn_jax.utils.progress import activity, log

CORPORA = ("embedded", "packages")
CORPUS, RECALL = "corpus", "recall"  # names of the sets in a mixture

_WANTED_BYTES = 100_000_000  # of the packages
_TOKENIZER_BYTES = 1 << 25  # that the tokenizer is trained on
_VALIDATION_FRACTION = 0.005  # of the packages
_BYTES_PER_WORKER = 1 << 23
_RECALL_DOCUMENTS = 20_000
_RECALL_SEED = 1  # scored questions have seed 0
_MIN_CHARACTERS = 32  # of a recall text


def recall_length(context: int) -> int:
    """Return the tokens of a recall text: half of the context, so that windows hold whole ones."""
    return context // 2


def data_path(
    workdir: str, corpus: str, recall: float, *, context: int, vocab_size: int, given: str = ""
) -> str:
    """Return `data.path` of the runs, whose sets are prepared in the workdir unless they are there.

    Args:
      workdir: the folder of the comparison.
      corpus: 'embedded' or 'packages'.
      recall: share of the training windows with texts of the recall tasks; 0 for none.
      context: tokens of a window.
      vocab_size: the vocabulary size of the models.
      given: a prepared set that takes the place of the corpus; '' for none.

    Raises:
      ValueError, OSError: see `prepare`; or the context is too short for recall texts.
    """
    folder = place(workdir)
    if given:
        prepared = PreparedSet.open(given)
    elif corpus == "packages":
        prepared = _packages(folder, context, vocab_size)
    else:
        prepared = ensure_embedded(folder / "data", context)
    if not recall:
        return str(prepared.folder)
    added = _recall_set(folder, prepared).folder
    return f"{CORPUS}={prepared.folder}:{1 - recall},{RECALL}={added}:{recall}"


def _packages(workdir: Place, context: int, vocab_size: int) -> PreparedSet:
    """Return the set of the packages' texts, with a tokenizer that was trained on them."""
    out, tokenizer = workdir / "data_packages", (workdir / TOKENIZER).absolute()
    if (out / INDEX).is_file():
        return PreparedSet.open(out)
    with activity("reading the installed packages"):
        documents = package_documents()
    size = sum(map(len, documents.values()))
    log(f"packages corpus: {len(documents):,} files of installed packages, {size:,} bytes")
    if size < _WANTED_BYTES:
        log(f"these are fewer than the {_WANTED_BYTES:,} bytes that are wanted; all are used")
    if not tokenizer.is_file():
        with activity("training the tokenizer"):
            tokenizer.write_whole(train_bpe(_first(documents.values()), vocab_size))
    return prepare(
        "packages",
        str(tokenizer),
        out,
        context=context,
        validation_fraction=_VALIDATION_FRACTION,
        workers=min(os.cpu_count() or 1, 1 + size // _BYTES_PER_WORKER),
    )


def _first(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the first texts, a sample of all, up to `_TOKENIZER_BYTES`."""
    texts, counted = itertools.tee(texts)
    ends = itertools.accumulate(map(len, counted))
    for text, end in zip(texts, ends, strict=True):
        if end > _TOKENIZER_BYTES:
            return
        yield text


def _recall_set(workdir: Place, corpus: PreparedSet) -> PreparedSet:
    """Return the set of recall texts with the tokenizer and the context of the corpus."""
    out, source = workdir / "data_recall", workdir / "recall.jsonl"
    if (out / INDEX).is_file():
        return PreparedSet.open(out)
    length = recall_length(corpus.context)
    size = min(characters_for(task, corpus.tokenizer, length, _RECALL_SEED) for task in TASKS)
    if size < _MIN_CHARACTERS:
        raise ValueError(
            f"--recall must be 0 for a context of {corpus.context} tokens, since half of them are "
            "too few for a question."
        )
    write(list(TASKS), size, _RECALL_DOCUMENTS, _RECALL_SEED, str(source))
    prepared = prepare(
        str(source),
        corpus.tokenizer_spec,
        out,
        context=corpus.context,
        eot_token=corpus.eot_token,
        first_token=corpus.first_token,
    )
    source.remove()
    return prepared
