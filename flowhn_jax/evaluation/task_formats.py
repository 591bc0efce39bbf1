"""Records of task files to items: each task's original formats, and one that is the same for all.

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
      pairs: (context, continuation) of each choice; of LAMBADA the one right continuation.
      gold: number of the right choice.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


def _text(record: Record, *keys: str) -> str:
    """The first of these keys that is there, a text that is not empty."""
    for key in keys:
        if key in record:
            value = record[key]
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{key!r} is {short_repr(value)}; accepted is a text")
            return value
    raise ValueError(f"there is no {' or '.join(map(repr, keys))}")


def _gold(value: Any, labels: list[Any]) -> int:
    """Place of the right label, whether it is a number or its digits."""
    for place, label in enumerate(labels):
        if not isinstance(value, bool) and str(value) == str(label):
            return place
    raise ValueError(f"the label is {short_repr(value)}; accepted are {short_list(labels)}")


def _label(record: Record, *keys: str) -> Any:
    for key in keys:
        if key in record:
            return record[key]
    raise ValueError(f"there is no {' or '.join(map(repr, keys))}")


def _choices(found: Any, count: int | None = None) -> list[str]:
    """Texts, `count` of them or, where that is None, two or more."""
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError(
            f"the choices are {short_repr(found)}; accepted are {count or 'two'} texts"
        )
    if count is not None and len(found) != count:
        raise ValueError(f"there are {len(found)} choices; accepted are {count}")
    for choice in found:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"a choice is {short_repr(choice)}; accepted is a text")
    return found


def _item(context: str, continuations: list[str], gold: int) -> Item:
    return Item(tuple((context, each) for each in continuations), gold)


def _simple(record: Record, count: int | None = None) -> Item:
    """Query, Choices (continuations with their leading space) and label, counted from 0."""
    choices = _choices(record.get("Choices"), count)
    labels = list(range(len(choices)))
    return _item(_text(record, "Query"), choices, _gold(_label(record, "label"), labels))


def _lambada(record: Record) -> Item:
    if "Query" in record:
        return _item(_text(record, "Query"), [_text(record, "label")], 0)
    context, space, word = _text(record, "text").rstrip().rpartition(" ")
    if not context.strip():
        raise ValueError("'text' has one word; accepted are two or more")
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
    """The sentence's end is scored behind each option (arXiv 1806.02847)."""
    if "Query" in record:
        contexts = _choices(record.get("Choices"), 2)
        end = _text(record, "Query")
        gold = _gold(_label(record, "label"), [1, 2])
        return Item(tuple((context, end) for context in contexts), gold)
    before, blank, end = _text(record, "sentence").partition("_")
    if not blank or not end.strip():
        raise ValueError("'sentence' has no text behind a '_'")
    options = _text(record, "option1"), _text(record, "option2")
    pairs = tuple((before + option, f" {end.strip()}") for option in options)
    return Item(pairs, _gold(_label(record, "answer"), [1, 2]))


def _arc(record: Record) -> Item:
    if "Query" in record:
        return _simple(record)
    question = record.get("question")
    if isinstance(question, Mapping):  # the original; Hugging Face's has columns
        stem, found = _text(question, "stem"), question.get("choices")
        if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
            raise ValueError(f"the choices are {short_repr(found)}; accepted is a list of objects")
        texts, labels = ([each.get(key) for each in found] for key in ("text", "label"))
    else:
        stem, found = _text(record, "question"), record.get("choices")
        if not isinstance(found, Mapping):
            raise ValueError(
                f"the choices are {short_repr(found)}; accepted are 'text' and 'label'"
            )
        texts, labels = found.get("text"), found.get("label")
        if not isinstance(labels, list):
            raise ValueError(f"the choices' labels are {short_repr(labels)}; accepted is a list")
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
