"""Downstream tasks, natively and offline: multiple choice by log-likelihood, and LAMBADA."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation.scoring import Pair, Score, Scorer, encode_pair, standard_error
from flowhn_jax.evaluation.task_files import Spoilt, TaskFile, read_task
from flowhn_jax.evaluation.task_formats import FORMATS, Item
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.text import short_repr

Result = dict[str, Any]

TASKS = tuple(FORMATS)
_NAMED = 5  # spoilt records that a result names


def parse_tasks(tasks: str) -> tuple[str, ...]:
    """Names with commas between them.

    Raises:
      ValueError: an unknown one, or one there twice.
    """
    names = tuple(name.strip() for name in tasks.split(","))
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks has {short_repr(name)}; accepted are {', '.join(TASKS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks is {short_repr(tasks)}; accepted is each task once.")
    return names


def evaluate_tasks(
    scorer: Scorer, tokenizer: Tokenizer, tasks: Sequence[str], folder: str
) -> dict[str, Result]:
    """Scores each task's file in `folder`; see `result_of` for what each comes to.

    Raises:
      FileNotFoundError, ValueError: a file that is missing or broken, before anything is scored.
    """
    files = {task: read_task(task, folder) for task in tasks}
    encoded = {task: _encoded(file, tokenizer) for task, file in files.items()}
    total = sum(len(pairs) for _, pairs, _ in encoded.values())
    results = {}
    with tqdm.tqdm(total=total, unit="pair", dynamic_ncols=True, file=sys.stderr) as bar:
        for task, (items, pairs, spoilt) in encoded.items():
            bar.set_description(task)
            results[task] = result_of(task, items, scorer.score(pairs, bar.update), spoilt)
    return results


def table(results: dict[str, Result]) -> str:
    """A row a task, as Markdown; accuracies in percent with their standard errors."""
    rows = []
    for task, result in results.items():
        cells = [_percent(result, key) for key in ("accuracy", "accuracy_norm")]
        perplexity = f"{result['perplexity']:,.2f}" if "perplexity" in result else ""
        counts = [f"{result[key]:,}" for key in ("n", "spoilt", "cut")]
        rows.append([task, *cells, f"{100 * result['chance']:.1f}", perplexity, *counts])
    headings = ["task", "accuracy %", "normalised %", "chance %", "perplexity"]
    return markdown([*headings, "n", "spoilt", "cut"], rows)


def _percent(result: Result, key: str) -> str:
    if key not in result:
        return ""
    return f"{100 * result[key]:.2f} ± {100 * result[f'{key}_stderr']:.2f}"


def _encoded(file: TaskFile, tokenizer: Tokenizer) -> tuple[list[Item], list[Pair], list[Spoilt]]:
    items, pairs, spoilt = [], [], list(file.spoilt)
    for record, item in file.items:
        try:
            of_item = [encode_pair(tokenizer, *pair) for pair in item.pairs]
        except ValueError as error:
            spoilt.append(Spoilt(record, str(error)))
            continue
        items.append(item)
        pairs += of_item
    if not items:
        raise ValueError(
            f"{str(file.path)!r} has no record that can be scored: {spoilt[0].reason}."
        )
    return items, pairs, sorted(spoilt)


def result_of(
    task: str, items: Sequence[Item], scores: Sequence[Score], spoilt: Sequence[Spoilt]
) -> Result:
    """Accuracy, and what else a task has, with standard errors.

    Args:
      task: its name.
      items: its questions.
      scores: of all their pairs, one question's after another's.
      spoilt: records that are not among them.

    Returns:
      accuracy: share of questions whose right choice is the likeliest; of LAMBADA, whose word is
        what greedy decoding gives. accuracy_norm: the same by log-likelihood a character, for
        multiple choice. perplexity: of LAMBADA's words. accuracy_stderr and so on; n: questions;
        chance: the share that guessing gets; cut: pairs whose context did not fit; spoilt: records
        left out, spoilt_records: the first of them, with reasons.
    """
    left = iter(scores)
    of_items = [[next(left) for _ in item.pairs] for item in items]
    result: Result = {}
    if task == "lambada":
        right = [float(score.is_greedy) for (score,) in of_items]
        likelihoods = [score.log_likelihood for (score,) in of_items]
        perplexity = math.exp(min(-math.fsum(likelihoods) / len(items), 700))
        spread = {
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * standard_error(likelihoods),
        }
        chance = 0.0
    else:
        right, normed = (
            [_is_right(*each, normed=is_normed) for each in zip(items, of_items, strict=True)]
            for is_normed in (False, True)
        )
        spread = {
            "accuracy_norm": math.fsum(normed) / len(items),
            "accuracy_norm_stderr": standard_error(normed),
        }
        chance = math.fsum(1 / len(item.pairs) for item in items) / len(items)
    result |= {"accuracy": math.fsum(right) / len(items), "accuracy_stderr": standard_error(right)}
    return (
        result
        | spread
        | {
            "n": len(items),
            "chance": chance,
            "cut": sum(score.is_cut for score in scores),
            "spoilt": len(spoilt),
            "spoilt_records": [f"{number}: {reason}" for number, reason in spoilt[:_NAMED]],
        }
    )


def _is_right(item: Item, scores: Sequence[Score], *, normed: bool) -> float:
    """1 where the right choice has the highest score, the first of equal ones being chosen."""
    values = [score.log_likelihood for score in scores]
    if normed:
        lengths = (len(continuation.removeprefix(" ")) for _, continuation in item.pairs)
        values = [value / max(1, length) for value, length in zip(values, lengths, strict=True)]
    return float(values.index(max(values)) == item.gold)
