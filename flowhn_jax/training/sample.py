"""The text that a model generates at the end of its run, as the workdir keeps it."""

import dataclasses

from flowhn_jax.report.table import to_json
from flowhn_jax.storage import AnyPath, place
from flowhn_jax.utils import json_text, typed

FILE = "sample.json"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generated text.

    Attributes:
      step: after which it was generated.
      prompt: the beginning, from the validation set.
      text: what the model continued it with.
    """

    step: int
    prompt: str
    text: str


def write_sample(workdir: AnyPath, sample: Sample) -> None:
    """Write the sample to the workdir."""
    (place(workdir) / FILE).write_whole(to_json(dataclasses.asdict(sample)) + "\n")


def read_sample(workdir: AnyPath) -> Sample | None:
    """Return the sample of a workdir, if it has one.

    Raises:
      ValueError: the file is damaged.
    """
    path = place(workdir) / FILE
    if not path.is_file():
        return None
    name = repr(str(path))
    try:
        return typed.build(Sample, json_text.loads(path.read(), "it"), what="key")
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
