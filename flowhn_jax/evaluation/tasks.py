"""Downstream tasks from local files: multiple choice by log-likelihood, and LAMBADA."""

import math
from collections.abc import Sequence
from typing import Any

from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation.scoring import Pair, Score, Scorer, encode_pair, standard_error
from flowhn_jax.evaluation.task_files import MalformedRecord, TaskFile, read_task
from flowhn_jax.evaluation.task_formats import FORMATS, Item
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.name_lists import parse_name_list
from flowhn_jax.utils.progress import progress

Result = dict[str, Any]

TASKS = tuple(FORMATS)
_MAX_NAMED = 5  # malformed records that a result names


def parse_tasks(tasks: str) -> tuple[str, ...]:
    """Return the task names in a list separated by commas.

    Raises:
      ValueError: a name is unknown or given twice.
    """
    return parse_name_list("tasks", tasks, TASKS)


def evaluate_tasks(
    scorer: Scorer, tokenizer: Tokenizer, tasks: Sequence[str], folder: str
) -> dict[str, Result]:
    """Return the result of each task, whose files are in `folder`; see `summarize`.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged; raised before any task is scored.
    """
    files = {task: read_task(task, folder) for task in tasks}
    encoded = {task: _encode(file, tokenizer) for task, file in files.items()}
    total = sum(len(pairs) for _, pairs, _ in encoded.values())
    results = {}
    with progress(total, "scoring", "pairs") as bar:
        for task, (items, pairs, malformed) in encoded.items():
            bar.annotate(task)
            results[task] = summarize(task, items, scorer.score(pairs, bar.update), malformed)
    return results


def table(results: dict[str, Result]) -> str:
    """Return a Markdown table, a row per task; accuracies in percent with standard errors."""
    rows = []
    for task, result in results.items():
        cells = [_percent(result, key) for key in ("accuracy", "accuracy_norm")]
        perplexity = f"{result['perplexity']:,.2f}" if "perplexity" in result else ""
        counts = [f"{result[key]:,}" for key in ("n", "malformed", "truncated")]
        rows.append([task, *cells, f"{100 * result['chance']:.1f}", perplexity, *counts])
    headings = ["task", "accuracy %", "normalized %", "chance %", "perplexity"]
    return markdown([*headings, "n", "malformed", "truncated"], rows)


def _percent(result: Result, key: str) -> str:
    if key not in result:
        return ""
    return f"{100 * result[key]:.2f} ± {100 * result[f'{key}_stderr']:.2f}"


def _encode(
    file: TaskFile, tokenizer: Tokenizer
) -> tuple[list[Item], list[Pair], list[MalformedRecord]]:
    """Return the items that can be scored, all of their pairs, and the malformed records."""
    items: list[Item] = []
    pairs: list[Pair] = []
    malformed = list(file.malformed)
    for number, item in file.items:
        try:
            item_pairs = [encode_pair(tokenizer, *pair) for pair in item.pairs]
        except ValueError as error:
            malformed.append(MalformedRecord(number, str(error)))
            continue
        items.append(item)
        pairs += item_pairs
    if not items:
        raise ValueError(
            f"{str(file.path)!r} must have records that can be scored; in the first, "
            f"{min(malformed).reason}."
        )
    return items, pairs, sorted(malformed)


def summarize(
    task: str,
    items: Sequence[Item],
    scores: Sequence[Score],
    malformed: Sequence[MalformedRecord],
) -> Result:
    """Return the metrics of a task, with their standard errors (`..._stderr`).

    Args:
      task: the task's name.
      items: the task's questions.
      scores: scores of all questions' pairs, in order.
      malformed: records that were left out.

    Returns:
      accuracy: share of questions whose right choice is the likeliest; for LAMBADA, share of texts
        whose last word greedy decoding gives.
      accuracy_norm: the same by log-likelihood per character; not for LAMBADA.
      perplexity: per last word; only for LAMBADA.
      n: number of questions.
      chance: expected accuracy of random choices; 0 for LAMBADA.
      truncated: number of pairs whose context did not fit.
      malformed: number of malformed records, which are left out.
      malformed_records: numbers of the first of them, with reasons.
    """
    remaining = iter(scores)
    item_scores = [[next(remaining) for _ in item.pairs] for item in items]
    if task == "lambada":
        right = [float(score.is_greedy) for (score,) in item_scores]
        likelihoods = [score.log_likelihood for (score,) in item_scores]
        perplexity = math.exp(min(-math.fsum(likelihoods) / len(items), 700))
        more = {
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * standard_error(likelihoods),
        }
        chance = 0.0
    else:
        right, normalized = (
            [_is_right(*each, normalize=normalize) for each in zip(items, item_scores, strict=True)]
            for normalize in (False, True)
        )
        more = {
            "accuracy_norm": math.fsum(normalized) / len(items),
            "accuracy_norm_stderr": standard_error(normalized),
        }
        chance = math.fsum(1 / len(item.pairs) for item in items) / len(items)
    return {
        "accuracy": math.fsum(right) / len(items),
        "accuracy_stderr": standard_error(right),
        **more,
        "n": len(items),
        "chance": chance,
        "truncated": sum(score.is_truncated for score in scores),
        "malformed": len(malformed),
        "malformed_records": [f"{number}: {reason}" for number, reason in malformed[:_MAX_NAMED]],
    }


def _is_right(item: Item, scores: Sequence[Score], *, normalize: bool) -> float:
    """Return 1.0 if the right choice has the highest score, in a tie the first, else 0.0."""
    values = [score.log_likelihood for score in scores]
    if normalize:
        lengths = (len(continuation.removeprefix(" ")) for _, continuation in item.pairs)
        values = [value / max(1, length) for value, length in zip(values, lengths, strict=True)]
    return float(values.index(max(values)) == item.gold)
