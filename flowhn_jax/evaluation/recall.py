"""How much of its context a model recalls, by length: associative recall and a copied needle."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from flowhn_jax.config import ModelConfig
from flowhn_jax.data.synthetic import TASKS, Question, questions
from flowhn_jax.data.tokenizer import Tokenizer
from flowhn_jax.evaluation.scoring import Scorer, encode_pair, standard_error
from flowhn_jax.report.table import markdown
from flowhn_jax.utils.limits import MAX_POSITIONS
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import short_repr

Result = dict[str, Any]

_MAX_ITEMS = 1_000_000
_DEPTHS = 4  # equal parts of the text that accuracy is reported for


def parse_lengths(lengths: str | None, config: ModelConfig) -> list[int]:
    """Return the lengths in a list separated by commas; None: the context, halved down to 64.

    Raises:
      ValueError: a length is not an integer, below 64, or beyond what the model can read.
    """
    if lengths is None:
        halved = itertools.takewhile(
            lambda length: length >= 64, (config.context >> n for n in range(99))
        )
        return sorted(halved) or [config.context]
    longest = config.max_length or MAX_POSITIONS
    reason = f", the context {config.name} is planned for" if config.max_length else ""
    found = []
    for part in lengths.split(","):
        if not re.fullmatch(r" *[0-9]{2,9} *", part) or not 64 <= int(part) <= longest:
            raise ValueError(
                f"--lengths must be numbers from 64 to {longest}{reason}, separated by commas; got "
                f"{short_repr(lengths)}."
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
    """Return the results of `items` questions of each task at each length.

    Args:
      scorer_for: returns a scorer that reads contexts of a given length.
      tokenizer: the model's tokenizer.
      lengths: approximate number of tokens of a question with its answer.
      items: questions per task and length.
      seed: seed of the questions.

    Returns:
      For each task and length: accuracy, the share of answers that greedy decoding gives, with its
      standard error; log_likelihood, nats per answer; and accuracy_by_depth, the accuracy for facts
      in each quarter of the text, None where no question asks about that quarter.

    Raises:
      ValueError: `items` is out of range.
    """
    if not 1 <= items <= _MAX_ITEMS:
        raise ValueError(f"--items must be 1 to {_MAX_ITEMS}; got {items}.")
    results = []
    total = items * len(lengths) * len(TASKS)
    with progress(total, "recalling", "questions") as bar:
        for task, length in itertools.product(TASKS, lengths):
            bar.annotate(f"{task}, {length:,} tokens")
            size = characters_for(task, tokenizer, length, seed)
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


def characters_for(task: str, tokenizer: Tokenizer, length: int, seed: int) -> int:
    """Return about how many characters of a question fill `length` tokens with its answer."""
    example = next(questions(task, 4096, seed))
    text = example.context + example.answer
    per_token = len(text) / len(tokenizer.encode(text))
    return int((length - 1) * per_token) - len(example.answer)  # one token begins the document


def _by_depth(asked: Sequence[Question], right: Sequence[float]) -> list[float | None]:
    parts: list[list[float]] = [[] for _ in range(_DEPTHS)]
    for question, each in zip(asked, right, strict=True):
        parts[min(int(question.depth * _DEPTHS), _DEPTHS - 1)].append(each)
    return [sum(part) / len(part) if part else None for part in parts]


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table, a row per task and length; accuracies in percent."""
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
