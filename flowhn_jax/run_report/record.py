"""What a workdir tells about its run: config, rows, result, sample and losses by position."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowhn_jax import config as config_lib
from flowhn_jax import models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.rows import Row, number, read_rows
from flowhn_jax.config import Config
from flowhn_jax.evaluation import by_position
from flowhn_jax.storage import place
from flowhn_jax.training.sample import Sample, read_sample

BITS = "validation_bits_per_byte"


class Record(NamedTuple):
    """A run.

    Attributes:
      name: the name of the run on the page.
      config: the config of the run.
      rows: the rows of its metrics.jsonl.
      parameters: number of the model's parameters.
      curve: the losses by position, if the workdir has them.
      sample: the text that the model generated after the last step, if the workdir has one.
    """

    name: str
    config: Config
    rows: list[Row]
    parameters: int
    curve: by_position.Curve | None
    sample: Sample | None

    def values(self, key: str) -> list[tuple[Row, float]]:
        """Return the rows that have a number for a key, each with the number."""
        return [(row, value) for row in self.rows if (value := number(row, key)) is not None]

    def last(self, key: str) -> float | None:
        """Return the last number for a key, if any."""
        found = self.values(key)
        return found[-1][1] if found else None

    def best(self) -> tuple[float, int] | None:
        """Return the best validation in bits per byte and its step, if there is any."""
        return min(((bits, row["step"]) for row, bits in self.values(BITS)), default=None)

    def median(self, key: str) -> float | None:
        """Return the median over all rows of a key's numbers, if there are any."""
        found = [value for _, value in self.values(key)]
        return statistics.median(found) if found else None

    def seconds(self) -> float:
        """Return the time in all steps so far."""
        total, before = 0.0, 0
        for row, seconds in self.values("step_seconds"):
            total += seconds * (row["step"] - before)
            before = row["step"]
        return total


def read_records(workdirs: Sequence[str]) -> list[Record]:
    """Return the runs of these folders.

    Raises:
      FileNotFoundError: one is not the folder of a run.
      ValueError: a file in one is damaged, or a folder is given twice.
    """
    folders = [str(place(workdir).absolute()) for workdir in workdirs]
    for workdir, folder in zip(workdirs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"each folder must be given once; got {workdir!r} twice.")
    names = [place(folder).name for folder in folders]
    if len(set(names)) < len(names):
        names = list(workdirs)
    return [_read(name, workdir) for name, workdir in zip(names, workdirs, strict=True)]


def _read(name: str, workdir: str) -> Record:
    config = workdir_lib.read_config(workdir)
    return Record(
        name=name,
        config=config,
        rows=read_rows(workdir),
        parameters=models.param_count(config.model),
        curve=by_position.read(workdir),
        sample=read_sample(workdir),
    )


def flat_config(config: Config) -> dict[str, Any]:
    """Return the values of a config by their dotted keys, without those that its model ignores."""
    values = config_lib.to_dict(config)
    read = {"kind", *(field.name for field in dataclasses.fields(config.model))}
    values["model"] = {name: value for name, value in values["model"].items() if name in read}
    return config_lib.flat(values)
