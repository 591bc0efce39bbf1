"""Where a fuzzed command line stops: behind its inputs, before the minutes of training or scoring.

Each function is called in the child, whose modules it changes.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from flowhn_jax import models
from flowhn_jax.bench import throughput
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.config import Config
from flowhn_jax.data import corpus
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches, validation_batches
from flowhn_jax.evaluation import by_position, generate, perplexity, scoring
from flowhn_jax.evaluation import evaluate as run
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.training import trainer

_MAX_ROWS = 64  # of a batch that is read, whatever the config asks for


def without_the_corpus() -> None:
    """The embedded corpus is no user's input, and takes seconds."""
    corpus.embedded_documents = lambda: {"one": b"A text.\n" * 20, "two": b"Another text."}


def for_train(meanwhile: Callable[[], None] | None = None) -> None:
    """train.py opens what it trains on and reads of it; `meanwhile` is called behind a batch."""
    without_the_corpus()

    def fit(config: Config, workdir: str, **_: Any) -> None:
        mesh = make_mesh(config.mesh, perplexity.eval_batch_size(config))
        workdir_lib.make(workdir)
        config = workdir_lib.with_recorded_share(workdir, config)
        check_sequence(config.model, mesh)
        if (workdir_lib.pathlib.Path(workdir) / "config.json").exists():
            workdir_lib.check(workdir, config)
        prepared = open_data(config, workdir)
        rows = min(config.train.batch_size, _MAX_ROWS)
        batches = train_batches(prepared, batch_size=rows, seed=config.data.seed)
        with contextlib.closing(batches):
            next(batches)
            if meanwhile is not None:
                meanwhile()
            for _ in range(1 if meanwhile is None else len(prepared.windows("train")) // rows):
                next(batches)
        most = config.train.eval_windows or None
        next(validation_batches(prepared, rows, max_windows=most))
        prepared.tokenizer.encode("A text.")
        workdir_lib.write_config(workdir, config)

    trainer.fit = fit


def _read(batches: Any, text_bytes: int) -> perplexity.Quality:
    """Reads two batches in place of scoring all."""
    for _ in itertools.islice(batches, 2):
        pass
    return perplexity.Quality(1.0, 1, text_bytes)


def for_checkpoint() -> None:
    """eval.py --mode=perplexity loads the parameters and reads the data."""
    perplexity.evaluate = lambda step, params, batches, text_bytes: _read(batches, text_bytes)


class _Curve(perplexity.Quality):
    def quality(self, text_bytes: int) -> perplexity.Quality:
        return dataclasses.replace(self, bytes=text_bytes)


def _measured(config: Config, params: Any, batches: Any) -> _Curve:
    return _Curve(**dataclasses.asdict(_read(batches, 1)))


class _Scorer:
    """Gives every pair the same score."""

    def score(self, pairs: list, on_scored: Callable[[int], None] = lambda count: None) -> list:
        on_scored(len(pairs))
        return [scoring.Score(-1.0, True, False)] * len(pairs)


_GENERATED = 60  # tokens, spread over the vocabulary, and beyond the tokenizer's


def _generated(rows: list, batch: int, config: Any, *_: Any) -> None:
    for row in rows:
        for number in range(_GENERATED):
            row.stream.push(number * 17 % config.vocab_size)
        row.finish = "length"
        row.stream.finish()


def for_eval() -> None:
    """eval.py without parameters and without a model that runs."""
    without_the_corpus()
    for_checkpoint()
    run.load_params = lambda *_: None
    by_position.measure = _measured
    by_position.write = lambda *_: "written"
    throughput.measure = lambda config, mesh, repeats=10: {"repeats": repeats}
    models.for_inference = lambda config, params: params
    generate._run_batch = _generated
    run._scorer = lambda trained, context=None: _Scorer()
