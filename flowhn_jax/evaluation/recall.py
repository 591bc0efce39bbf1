"""How much of its context a model recalls, by length: associative recall and a needle's copy."""

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from flowhn_jax.config import ModelConfig
from flowhn_jax.data.synthetic import TASKS, Question, questions
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation.scoring import Scorer, encode_pair, standard_error
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.limits import MAX_POSITIONS
from flowhn_jax.utils.text import short_repr

Result = dict[str, Any]

_MAX_ITEMS = 1_000_000
_DEPTHS = 4  # parts of the text that accuracy is told of, from its beginning


def parse_lengths(lengths: str | None, config: ModelConfig) -> list[int]:
    """Numbers of tokens with commas between them; None: the context, halved down to 64.

    Raises:
      ValueError: what is no number from 64 on, or is beyond the context of a split tied to it.
    """
    if lengths is None:
        halved = itertools.takewhile(
            lambda length: length >= 64, (config.context >> n for n in range(99))
        )
        return sorted(halved) or [config.context]
    most = config.max_length or MAX_POSITIONS
    reason = f", which {config.name} is for" if config.max_length else ""
    found = []
    for part in lengths.split(","):
        if not re.fullmatch(r" *[0-9]{2,9} *", part) or not 64 <= int(part) <= most:
            raise ValueError(
                f"--lengths is {short_repr(lengths)}; accepted are numbers 64 to {most}{reason}."
            )
        found.append(int(part))
    return found


def measure(
    scorer_for: Callable[[int], Scorer],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    items: int,
    seed: int,
) -> list[Result]:
    """Asks `items` questions of each task at each length.

    Args:
      scorer_for: what reads contexts of a length.
      tokenizer: the model's.
      lengths: tokens that a question and its answer fill, about.
      items: questions of each.
      seed: of the questions.

    Returns:
      For each task and length: accuracy, the share of answers that greedy decoding gives, with its
      standard error; log_likelihood, nats an answer; and accuracy_by_depth, of what stands in each
      quarter of the text, None where nothing was asked of it.
    """
    if not 1 <= items <= _MAX_ITEMS:
        raise ValueError(f"--items is {items}; accepted is 1 to {_MAX_ITEMS}.")
    results = []
    total = items * len(lengths) * len(TASKS)
    with tqdm.tqdm(total=total, unit="question", dynamic_ncols=True, file=sys.stderr) as bar:
        for task, length in itertools.product(TASKS, lengths):
            bar.set_description(f"{task}, {length}")
            size = _size_for(task, tokenizer, length, seed)
            asked = list(itertools.islice(questions(task, size, seed), items))
            pairs = [encode_pair(tokenizer, each.context, each.answer) for each in asked]
            scores = scorer_for(length).score(pairs, bar.update)
            right = [float(score.is_greedy) for score in scores]
            results.append(
                {
                    "task": task,
                    "length": length,
                    "accuracy": sum(right) / items,
                    "accuracy_stderr": standard_error(right),
                    "log_likelihood": sum(score.log_likelihood for score in scores) / items,
                    "accuracy_by_depth": _by_depth(asked, right),
                }
            )
    return results


def _size_for(task: str, tokenizer: Tokenizer, length: int, seed: int) -> int:
    """Characters whose tokens, with the one that begins a document, fill `length`, about."""
    example = next(questions(task, 4096, seed))
    text = example.context + example.answer
    a_token = len(text) / len(tokenizer.encode(text))
    return int((length - 1) * a_token) - len(example.answer)


def _by_depth(asked: Sequence[Question], right: Sequence[float]) -> list[float | None]:
    parts: list[list[float]] = [[] for _ in range(_DEPTHS)]
    for question, each in zip(asked, right, strict=True):
        parts[min(int(question.depth * _DEPTHS), _DEPTHS - 1)].append(each)
    return [sum(part) / len(part) if part else None for part in parts]


def table(results: Sequence[Result]) -> str:
    """A row a task and length, as Markdown, in percent."""
    rows = [
        [
            result["task"],
            f"{result['length']:,}",
            f"{100 * result['accuracy']:.1f} ± {100 * result['accuracy_stderr']:.1f}",
            *("" if each is None else f"{100 * each:.1f}" for each in result["accuracy_by_depth"]),
        ]
        for result in results
    ]
    parts = [f"quarter {number}" for number in range(1, _DEPTHS + 1)]
    return markdown(["task", "tokens", "accuracy %", *parts], rows)
