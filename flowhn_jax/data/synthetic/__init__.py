"""Texts with something to recall: `python -m flowhn_jax.data.synthetic` to train, and to ask.

| task          | text                                                                            |
|---------------|---------------------------------------------------------------------------------|
| `associative` | pairs of letters and a digit, then letters of one, whose digit is asked         |
|               | (arXiv 2312.04927, section 3)                                                   |
| `needle`      | words at random, a pass key among them at some depth, and the key asked at the  |
|               | end (arXiv 2305.16300, section 4.3)                                             |
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from flowhn_jax.utils.files import whole_file
from flowhn_jax.utils.text import short_repr

MAX_CHARACTERS = 1 << 24

_WORDS = (
    "grass",
    "sky",
    "sun",
    "river",
    "stones",
    "birds",
    "sing",
    "old",
    "trees",
    "small",
    "town",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Question(NamedTuple):
    """A text, and what goes on behind it."""

    context: str
    answer: str
    depth: float  # where in the text it stands, 0 (the beginning) to 1


def associative(rng: np.random.Generator, size: int) -> Question:
    """Pairs such as 'qx 7' until about `size` characters, each letters' digit its own."""
    letters = 2
    while len(_LETTERS) ** letters < size // (letters + 3):  # no two names alike
        letters += 1
    count = max(1, (size - letters - 1) // (letters + 3))
    powers = len(_LETTERS) ** np.arange(letters)
    places = rng.permutation(len(_LETTERS) ** letters)[:count, None] // powers % len(_LETTERS)
    names = ["".join(_LETTERS[place] for place in row) for row in places]
    digits = rng.integers(0, 10, len(names))
    pairs = " ".join(f"{name} {digit}" for name, digit in zip(names, digits, strict=True))
    asked = int(rng.integers(len(names)))
    depth = asked / max(1, len(names) - 1)
    return Question(f"{pairs} {names[asked]}", f" {digits[asked]}", depth)


def needle(rng: np.random.Generator, size: int) -> Question:
    """Words until about `size` characters, with 'pass key 4821.' at any depth among them."""
    key = "".join(map(str, rng.integers(0, 10, 4)))
    told, asked = f"pass key {key}.", "pass key"
    words: list[str] = []
    left = size - len(told) - len(asked) - 2
    while left > 0:
        words.append(_WORDS[rng.integers(len(_WORDS))])
        left -= len(words[-1]) + 1
    place = int(rng.integers(len(words) + 1))
    text = " ".join([*words[:place], told, *words[place:], asked])
    return Question(text, f" {key}", place / max(1, len(words)))


TASKS: dict[str, Callable[[np.random.Generator, int], Question]] = {
    "associative": associative,
    "needle": needle,
}


def questions(task: str, size: int, seed: int) -> Iterator[Question]:
    """Questions of about `size` characters without end; the same seed gives the same."""
    rng = np.random.default_rng([seed, size, list(TASKS).index(task)])
    while True:
        yield TASKS[task](rng, size)


def write(tasks: list[str], size: int, documents: int, seed: int, out: str) -> None:
    """Writes `documents` texts with their answers, of the tasks in turns, as JSONL for `prepare`.

    Raises:
      ValueError: an unknown task, or a size or number too small.
    """
    for name, value, least, most in (
        ("size", size, 32, MAX_CHARACTERS),
        ("documents", documents, 1, 2**63 - 1),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not least <= value <= most:
            raise ValueError(f"--{name} is {short_repr(value)}; accepted is {least} to {most}.")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks has {short_repr(task)}; accepted are {', '.join(TASKS)}.")
    streams = [questions(task, size, seed) for task in tasks]
    with whole_file(pathlib.Path(out)) as temporary, temporary.open("w") as file:
        for number in tqdm.trange(documents, unit="document", file=sys.stderr):
            question = next(streams[number % len(streams)])
            file.write(json.dumps({"text": question.context + question.answer}) + "\n")
    print(f"wrote {documents:,} documents to {out}")
