"""Recall tasks, to train on and to evaluate.

| task          | text                                                                            |
|---------------|---------------------------------------------------------------------------------|
| `associative` | pairs of a name (letters) and a digit, then one of the names, whose digit is    |
|               | the answer (arXiv 2312.04927, section 3)                                        |
| `needle`      | random words with a pass key at some depth, then the question for the key       |
|               | (arXiv 2305.16300, section 4.3)                                                 |
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

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
    """A text and how it must continue.

    Attributes:
      context: the text.
      answer: its continuation.
      depth: where the answer is stated in the text, from 0 (the beginning) to 1 (the end).
    """

    context: str
    answer: str
    depth: float


def associative(rng: np.random.Generator, size: int) -> Question:
    """Return about `size` characters of pairs such as 'qx 7', with distinct names, and a name."""
    letters = 2
    while len(_LETTERS) ** letters < size // (letters + 3):  # enough for distinct names
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
    """Return about `size` characters of words, with 'pass key 4821.' at a random depth."""
    key = "".join(map(str, rng.integers(0, 10, 4)))
    statement, question = f"pass key {key}.", "pass key"
    words: list[str] = []
    left = size - len(statement) - len(question) - 2
    while left > 0:
        words.append(_WORDS[rng.integers(len(_WORDS))])
        left -= len(words[-1]) + 1
    place = int(rng.integers(len(words) + 1))
    text = " ".join([*words[:place], statement, *words[place:], question])
    return Question(text, f" {key}", place / max(1, len(words)))


TASKS: dict[str, Callable[[np.random.Generator, int], Question]] = {
    "associative": associative,
    "needle": needle,
}


def questions(task: str, size: int, seed: int) -> Iterator[Question]:
    """Yield questions of about `size` characters without end, determined by the seed."""
    rng = np.random.default_rng([seed, size, list(TASKS).index(task)])
    while True:
        yield TASKS[task](rng, size)
