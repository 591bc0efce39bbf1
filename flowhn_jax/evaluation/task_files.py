"""Find and read the files of tasks: JSONL or parquet, and a file of labels for PIQA."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from flowhn_jax.evaluation.task_formats import FORMATS, Item
from flowhn_jax.storage import Place, place
from flowhn_jax.utils import json_text
from flowhn_jax.utils.text import one_line, short_list, short_path, short_repr

_ENDINGS = (".jsonl", ".json", ".parquet")


class MalformedRecord(NamedTuple):
    """A record that cannot be scored."""

    number: int  # of the record in its file, from 1
    reason: str


class TaskFile(NamedTuple):
    """The content of a task's file."""

    path: Place
    items: list[tuple[int, Item]]  # each with the number of its record, from 1
    malformed: list[MalformedRecord]


def find_file(task: str, folder: str) -> Place:
    """Return the file in `folder` whose name starts with the task's, such as ARC-Easy-test.jsonl.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: the task is unknown, or there are several such files.
    """
    if task not in FORMATS:
        raise ValueError(f"A task must be one of {', '.join(FORMATS)}; got {short_repr(task)}.")
    path = place(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"--task_dir must be the folder of the task files; {short_path(folder)} is no folder."
        )
    names = [each for each in path.children() if each.suffix in _ENDINGS and each.is_file()]
    found = [each for each in names if each.name.lower().replace("-", "_").startswith(task)]
    if not found:
        raise FileNotFoundError(
            f"--task_dir must have a file {task}*.jsonl or {task}*.parquet for the task {task}; "
            f"{short_path(folder)} has {short_list(each.name for each in names) or 'no task file'}."
        )
    if len(found) > 1:
        raise ValueError(
            f"--task_dir must have one file for the task {task}; {short_path(folder)} has "
            f"{short_list(each.name for each in found)}."
        )
    return found[0]


def read_task(task: str, folder: str) -> TaskFile:
    """Return the content of a task's file, with its malformed records listed separately.

    Raises:
      FileNotFoundError, ValueError: as in `find_file`, or the file cannot be read, or all of its
        records are malformed.
    """
    path = find_file(task, folder)
    records = list(_parquet(path) if path.suffix == ".parquet" else _json_lines(path))
    if task == "piqa":
        _add_labels(path, records)
    items, malformed = [], []
    for number, record in enumerate(records, 1):
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"the record must be an object; got {short_repr(record)}")
            items.append((number, FORMATS[task](record)))
        except ValueError as error:
            malformed.append(MalformedRecord(number, str(error)))
    if not items:
        found = f"in the first, {malformed[0].reason}" if malformed else "it is empty"
        raise ValueError(f"{str(path)!r} must have well-formed records of {task}; {found}.")
    return TaskFile(path, items, malformed)


def _json_lines(path: Place) -> Iterator[Any]:
    """Yield the JSON value in each line, or a ValueError where a line is not JSON."""
    for line in path.read().splitlines():
        if line.strip():
            try:
                yield json_text.loads(line, "the record")
            except ValueError as error:
                yield ValueError(str(error).removesuffix("."))


def _parquet(path: Place) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.fetched() as file:
            return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} must be a parquet file: {one_line(error)}.") from error


def _add_labels(path: Place, records: list[Any]) -> None:
    """Add the labels of PIQA's original files to the records, from lines of NAME-labels.lst."""
    labels_path = path.parent / f"{path.stem}-labels.lst"
    if not labels_path.is_file():
        return
    try:
        labels = labels_path.read_text().split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(labels_path)!r} must be UTF-8 text: {error}.") from error
    if len(labels) != len(records):
        raise ValueError(
            f"{str(labels_path)!r} must have a label for each of the {len(records)} records of "
            f"{path.name}; it has {len(labels)}."
        )
    for record, label in zip(records, labels, strict=True):
        if isinstance(record, dict):
            record.setdefault("label", label)
