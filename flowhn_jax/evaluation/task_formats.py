"""Turn records of task files into items: each task's original formats, and a common simple one.

The prompts are those of EleutherAI's lm-evaluation-harness.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from flowhn_jax.utils.text import short_list, short_repr

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      pairs: (context, continuation) of each choice; for LAMBADA, only the right continuation.
      gold: index of the right choice.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


def _text(record: Record, *keys: str) -> str:
    """Return the value of the first key present, which must be a non-empty text."""
    key, value = _value(record, *keys)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} must be a non-empty text; got {short_repr(value)}")
    return value


def _gold(value: Any, labels: list[Any]) -> int:
    """Return the index of a label, which may be a number or its digits."""
    for place, label in enumerate(labels):
        if not isinstance(value, bool) and str(value) == str(label):
            return place
    raise ValueError(f"the label must be one of {short_list(labels)}; got {short_repr(value)}")


def _value(record: Record, *keys: str) -> tuple[str, Any]:
    """Return the first key that is present, and its value."""
    for key in keys:
        if key in record:
            return key, record[key]
    raise ValueError(f"{' or '.join(map(repr, keys))} is missing")


def _label(record: Record, *keys: str) -> Any:
    return _value(record, *keys)[1]


def _choices(found: Any, count: int | None = None) -> list[str]:
    """Return the choices, which must be `count` texts, or at least two if it is None."""
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError(
            f"the choices must be {count or 'at least two'} texts; got {short_repr(found)}"
        )
    if count is not None and len(found) != count:
        raise ValueError(f"the number of choices must be {count}; got {len(found)}")
    for choice in found:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"a choice must be a non-empty text; got {short_repr(choice)}")
    return found


def _item(context: str, continuations: list[str], gold: int) -> Item:
    return Item(tuple((context, each) for each in continuations), gold)


def _simple(record: Record, count: int | None = None) -> Item:
    """Return the item of Query, Choices (with their leading space) and label, counted from 0."""
    choices = _choices(record.get("Choices"), count)
    labels = list(range(len(choices)))
    return _item(_text(record, "Query"), choices, _gold(_label(record, "label"), labels))


def _lambada(record: Record) -> Item:
    if "Query" in record:
        return _item(_text(record, "Query"), [_text(record, "label")], 0)
    context, space, word = _text(record, "text").rstrip().rpartition(" ")
    if not context.strip():
        raise ValueError("'text' must have at least two words; it has one")
    return _item(context, [space + word], 0)


def _piqa(record: Record) -> Item:
    if "Query" in record:
        return _simple(record, 2)
    context = f"Question: {_text(record, 'goal')}\nAnswer:"
    choices = [f" {_text(record, 'sol1')}", f" {_text(record, 'sol2')}"]
    return _item(context, choices, _gold(_label(record, "label"), [0, 1]))


def _boolq(record: Record) -> Item:
    if "Query" in record:
        return _simple(record, 2)
    question = _text(record, "question").removesuffix("?")
    context = f"{_text(record, 'passage')}\nQuestion: {question}?\nAnswer:"
    label = _label(record, "label", "answer")
    label = int(label) if isinstance(label, bool) else label
    return _item(context, [" no", " yes"], _gold(label, [0, 1]))


def _winogrande(record: Record) -> Item:
    """Return the end of the sentence after each option (arXiv 1806.02847)."""
    if "Query" in record:
        contexts = _choices(record.get("Choices"), 2)
        end = _text(record, "Query")
        gold = _gold(_label(record, "label"), [1, 2])
        return Item(tuple((context, end) for context in contexts), gold)
    before, blank, end = _text(record, "sentence").partition("_")
    if not blank or not end.strip():
        raise ValueError("'sentence' must have a '_' and text after it")
    options = _text(record, "option1"), _text(record, "option2")
    pairs = tuple((before + option, f" {end.strip()}") for option in options)
    return Item(pairs, _gold(_label(record, "answer"), [1, 2]))


def _arc(record: Record) -> Item:
    if "Query" in record:
        return _simple(record)
    question = record.get("question")
    if isinstance(question, Mapping):  # the original format; Hugging Face's has columns
        stem, found = _text(question, "stem"), question.get("choices")
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise ValueError(f"the choices must be a list of objects; got {short_repr(found)}")
        texts, labels = ([each.get(key) for each in found] for key in ("text", "label"))
    else:
        stem, found = _text(record, "question"), record.get("choices")
        if not isinstance(found, Mapping):
            raise ValueError(
                f"the choices must be an object with 'text' and 'label'; got {short_repr(found)}"
            )
        texts, labels = found.get("text"), found.get("label")
        if not isinstance(labels, list):
            raise ValueError(f"the choices' labels must be a list; got {short_repr(labels)}")
    choices = [f" {text}" for text in _choices(texts)]
    return _item(f"Question: {stem}\nAnswer:", choices, _gold(_label(record, "answerKey"), labels))


def _hellaswag(record: Record) -> Item:
    if "Query" in record:
        return _simple(record, 4)
    start = f"{_text(record, 'ctx_a')} {str(record.get('ctx_b', '')).capitalize()}"
    context = _without_markup(f"{_text(record, 'activity_label')}: {start}")
    endings = _choices(record.get("endings"), 4)
    choices = [f" {_without_markup(ending)}" for ending in endings]
    return _item(context, choices, _gold(_label(record, "label"), list(range(len(choices)))))


def _without_markup(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


FORMATS: Mapping[str, Callable[[Record], Item]] = {
    "lambada": _lambada,
    "piqa": _piqa,
    "boolq": _boolq,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "hellaswag": _hellaswag,
}
