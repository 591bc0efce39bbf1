"""Writing texts of recall tasks to train on."""

import json

from flowhn_jax.data.synthetic.tasks import MAX_CHARACTERS, TASKS, questions
from flowhn_jax.storage import place
from flowhn_jax.utils.progress import progress
from flowhn_jax.utils.text import short_repr


def write(tasks: list[str], size: int, documents: int, seed: int, out: str) -> None:
    """Write questions with their answers as a .jsonl file for `prepare`.

    Args:
      tasks: the tasks, which alternate.
      size: the characters of a document, about.
      documents: the number of documents.
      seed: the seed of `questions`.
      out: the file to write.

    Raises:
      ValueError: a task is unknown, or a number is out of range.
      OSError: the file cannot be written.
    """
    for name, value, least, most in (
        ("size", size, 32, MAX_CHARACTERS),
        ("documents", documents, 1, 2**63 - 1),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not least <= value <= most:
            raise ValueError(f"--{name} must be from {least} to {most}; got {short_repr(value)}.")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks must be among {', '.join(TASKS)}; got {short_repr(task)}.")
    streams = [questions(task, size, seed) for task in tasks]
    with place(out).writing() as temporary, temporary.open("w") as file:
        for number in progress(range(documents), "writing", "documents"):
            question = next(streams[number % len(streams)])
            file.write(json.dumps({"text": question.context + question.answer}) + "\n")
    print(f"Wrote {documents:,} documents to {out}")
