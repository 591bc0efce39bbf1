"""Finding and reading the files of tasks: JSONL or parquet, with labels beside them for PIQA."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from flowhn_jax.evaluation.task_formats import FORMATS, Item
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import one_line, short_list, short_repr

_ENDINGS = (".jsonl", ".json", ".parquet")


class Spoilt(NamedTuple):
    """A record that cannot be scored."""

    record: int  # counted from 1
    reason: str


class TaskFile(NamedTuple):
    """What a task's file holds."""

    path: pathlib.Path
    items: list[tuple[int, Item]]  # with the record's number, from 1
    spoilt: list[Spoilt]


def find_file(task: str, folder: str) -> pathlib.Path:
    """The one file in `folder` whose name begins with the task's, such as ARC-Easy-test.jsonl.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: an unknown task, or more than one file.
    """
    if task not in FORMATS:
        raise ValueError(f"The task is {task!r}; accepted are {', '.join(FORMATS)}.")
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"--task_dir is {folder!r}; accepted is a folder of task files.")
    names = sorted(each for each in path.iterdir() if each.suffix in _ENDINGS and each.is_file())
    found = [each for each in names if each.name.lower().replace("-", "_").startswith(task)]
    if not found:
        raise FileNotFoundError(
            f"{folder!r} has no file for the task {task}; accepted is one named {task}*.jsonl or "
            f"{task}*.parquet. There are {short_list(each.name for each in names) or 'none'}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder!r} has {short_list(each.name for each in found)} for the task {task}; "
            "accepted is one file."
        )
    return found[0]


def read_task(task: str, folder: str) -> TaskFile:
    """Reads a task's items; records that are spoilt are left out, and told.

    Raises:
      FileNotFoundError, ValueError: as of `find_file`, or the file cannot be read or has no record
        that can be scored.
    """
    path = find_file(task, folder)
    records = list(_parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    if task == "piqa":
        _add_labels(path, records)
    items, spoilt = [], []
    for number, record in enumerate(records, 1):
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"it is {short_repr(record)}; accepted is an object")
            items.append((number, FORMATS[task](record)))
        except ValueError as error:
            spoilt.append(Spoilt(number, str(error)))
    if not items:
        first = f"; the first: {spoilt[0].reason}" if spoilt else ""
        raise ValueError(f"{str(path)!r} has no record of {task} that can be scored{first}.")
    return TaskFile(path, items, spoilt)


def _json_lines(path: pathlib.Path) -> Iterator[Any]:
    """An object a line, or the error of the line that is none."""
    for line in path.read_bytes().splitlines():
        if line.strip():
            try:
                yield json_text.loads(line, "it")
            except ValueError as error:
                yield ValueError(str(error).removesuffix("."))


def _parquet(path: pathlib.Path) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no whole parquet file: {one_line(error)}.") from error


def _add_labels(path: pathlib.Path, records: list[Any]) -> None:
    """Puts in the labels of PIQA's original files, one a line in NAME-labels.lst."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    if not labels_path.is_file():
        return
    try:
        labels = labels_path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(labels_path)!r} is not UTF-8 text: {error}.") from error
    if len(labels) != len(records):
        raise ValueError(
            f"{str(labels_path)!r} has {len(labels)} labels, but {path.name} has {len(records)} "
            "records."
        )
    for record, label in zip(records, labels, strict=True):
        if isinstance(record, dict):
            record.setdefault("label", label)
