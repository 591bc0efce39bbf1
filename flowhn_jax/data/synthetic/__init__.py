"""Texts with something to recall: `python -m flowhn_jax.data.synthetic --help`."""

from flowhn_jax.data.synthetic.tasks import (
    MAX_CHARACTERS,
    TASKS,
    Question,
    associative,
    needle,
    questions,
)
from flowhn_jax.data.synthetic.writing import write

__all__ = [
    "MAX_CHARACTERS",
    "TASKS",
    "Question",
    "associative",
    "needle",
    "questions",
    "write",
]
