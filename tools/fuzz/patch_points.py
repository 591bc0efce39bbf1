"""Patches that make a fuzzed command stop after reading its inputs, before training or scoring.

Each `for_...` function is called in the child process and replaces functions there.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import types
from collections.abc import Callable
from typing import Any

from flowhn_jax import models
from flowhn_jax.bench import throughput
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.config import Config
from flowhn_jax.data import corpus, packages_corpus
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches, validation_batches
from flowhn_jax.evaluation import by_position, evaluate, generate, perplexity, scoring
from flowhn_jax.parallel.mesh import check_sequence, make_mesh
from flowhn_jax.training import trainer

_MAX_ROWS = 64  # sequences per batch, even if the config asks for more


def replace(owner: Any, **replacements: Any) -> None:
    """Replace attributes of a module or class.

    Raises:
      AttributeError: the owner has no attribute of that name, so the patch would do nothing.
    """
    for name, new in replacements.items():
        _check_name(owner, name)
        setattr(owner, name, new)


def with_replaced(module: Any, **replacements: Any) -> types.SimpleNamespace:
    """Return a copy of a module's namespace with some attributes replaced.

    Raises:
      AttributeError: the module has no attribute of that name.
    """
    for name in replacements:
        _check_name(module, name)
    return types.SimpleNamespace(**vars(module) | replacements)


def _check_name(owner: Any, name: str) -> None:
    if not hasattr(owner, name):
        raise AttributeError(
            f"{owner.__name__} has no {name!r} for the fuzzer to replace; if it was renamed, "
            "rename it in tools/fuzz/patch_points.py or measuring_patch_points.py too."
        )


def replace_corpus() -> None:
    """Replace the corpora that need no download: they are no user input, and slow to read."""
    texts = {"one": b"A text.\n" * 20, "two": b"Another text."}
    replace(corpus, embedded_documents=lambda: texts)
    replace(packages_corpus, package_documents=lambda: texts)


def for_train(meanwhile: Callable[[], None] | None = None) -> None:
    """Replace training by opening the workdir and the data and reading two batches.

    Args:
      meanwhile: called after the first batch; an epoch of batches is then read, not just one more.
    """
    replace_corpus()

    def fit(config: Config, workdir: str, **_: Any) -> None:
        mesh = make_mesh(config.mesh, perplexity.eval_batch_size(config))
        workdir_lib.make(workdir)
        config = workdir_lib.with_recorded_share(workdir, config)
        check_sequence(config.model, mesh)
        if (pathlib.Path(workdir) / "config.json").exists():
            workdir_lib.check(workdir, config)
        data = open_data(config, workdir)
        prepared = data.main
        rows = min(config.train.batch_size, _MAX_ROWS)
        batches = train_batches(data, batch_size=rows, seed=config.data.seed)
        with contextlib.closing(batches):
            next(batches)
            if meanwhile is not None:
                meanwhile()
            for _ in range(1 if meanwhile is None else len(prepared.windows("train")) // rows):
                next(batches)
        max_windows = config.train.eval_windows or None
        next(validation_batches(prepared, rows, max_windows=max_windows))
        prepared.tokenizer.encode("A text.")
        workdir_lib.write_config(workdir, config)

    replace(trainer, fit=fit)


def _read(batches: Any, text_bytes: int) -> perplexity.Quality:
    """Read two batches instead of scoring all."""
    for _ in itertools.islice(batches, 2):
        pass
    return perplexity.Quality(1.0, 1, text_bytes)


def for_checkpoint() -> None:
    """Replace scoring in eval.py --mode=perplexity; parameters and data are still read."""
    replace(
        perplexity, evaluate=lambda step, params, batches, text_bytes: _read(batches, text_bytes)
    )


class _Curve(perplexity.Quality):
    """A result of `_measured` with the method of `by_position.Curve` that eval.py calls."""

    def quality(self, text_bytes: int) -> perplexity.Quality:
        return dataclasses.replace(self, bytes=text_bytes)


def _measured(config: Config, params: Any, batches: Any) -> _Curve:
    return _Curve(**dataclasses.asdict(_read(batches, 1)))


class _Scorer:
    """A scorer that gives every pair the same score."""

    def score(self, pairs: list, on_scored: Callable[[int], None] = lambda count: None) -> list:
        on_scored(len(pairs))
        return [scoring.Score(-1.0, True, False)] * len(pairs)


_GENERATED = 60  # tokens of a row, also with ids of the model that the tokenizer does not have


def _generated(rows: list, batch: int, config: Any, *_: Any) -> None:
    for row in rows:
        for number in range(_GENERATED):
            row.stream.push(number * 17 % config.vocab_size)
        row.finish = "length"
        row.stream.finish()


def for_eval() -> None:
    """Replace loading parameters and running the model in all modes of eval.py."""
    replace_corpus()
    for_checkpoint()
    replace(evaluate, load_params=lambda *_: None, _scorer=lambda trained, context=None: _Scorer())
    replace(by_position, measure=_measured, write=lambda *_: "written")
    replace(throughput, measure=lambda config, mesh, repeats=10: {"repeats": repeats})
    replace(models, for_inference=lambda config, params: params)
    replace(generate, _run_batch=_generated)
