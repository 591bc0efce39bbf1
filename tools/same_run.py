"""Compare two workdirs: training state, rows of metrics, TensorBoard."""

import collections
import struct
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tensorboardX.proto.event_pb2 import Event

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.rows import Row, read_rows
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.storage import AnyPath, place
from flowhn_jax.training.events import tags

_CLOCK_NAMES = ("second", "mfu", "time", "data_wait", "goodput")


def differences(workdir: AnyPath, expected: AnyPath) -> dict[str, int]:
    """Count the differences between a run and an uninterrupted one, by kind.

    Compared are the arrays of the newest checkpoints (parameters, optimizer state, position in the
    data) bit for bit; the rows of metrics.jsonl, except for what depends on the clock; and the
    scalars in TensorBoard, of which each row must have exactly one.

    Args:
      workdir: the run to check.
      expected: workdir of the uninterrupted run.

    Returns:
      Numbers of differing arrays, compared, lost, doubled and changed rows, and differences in
      TensorBoard.
    """
    workdir, expected = str(workdir), str(expected)
    rows, expected_rows = read_rows(workdir), read_rows(expected)
    return {
        "differing_arrays": _differing_arrays(_state(workdir), _state(expected)),
        **_differing_rows(rows, expected_rows),
        "tensorboard_differences": _tensorboard_differences(workdir, rows),
    }


def _state(workdir: str) -> Any:
    config = workdir_lib.read_config(workdir)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    batches = train_batches(
        open_data(config, workdir), batch_size=config.train.batch_size, seed=config.data.seed
    )
    try:
        with jax.set_mesh(mesh), Checkpoints(workdir, config) as checkpoints:
            found = checkpoints.restore(abstract_state(config, mesh), batches)
            return jax.device_get(found), batches.get_state()
    finally:
        batches.close()


def _differing_arrays(found: Any, expected: Any) -> int:
    def differs(a: Any, b: Any) -> bool:
        return np.asarray(a).tobytes() != np.asarray(b).tobytes()

    return sum(jax.tree.leaves(jax.tree.map(differs, found, expected)))


def _without_clock(row: Row) -> Row:
    return {
        name: value for name, value in row.items() if not any(part in name for part in _CLOCK_NAMES)
    }


def _differing_rows(rows: list[Row], expected: list[Row]) -> dict[str, int]:
    counts = collections.Counter(row["step"] for row in rows)
    wanted = {row["step"]: _without_clock(row) for row in expected}
    return {
        "rows_compared": len(wanted),
        "lost_rows": sum(step not in counts for step in wanted),
        "doubled_rows": sum(count - 1 for count in counts.values()),
        "changed_rows": sum(wanted.get(row["step"]) != _without_clock(row) for row in rows),
    }


def _tensorboard_differences(workdir: str, rows: list[Row]) -> int:
    found = collections.Counter(_scalars(workdir))
    expected = {(row["step"], tag) for row in rows for tag in tags(row)}
    return sum(found[scalar] != (scalar in expected) for scalar in expected | set(found))


def _scalars(workdir: str) -> Iterator[tuple[int, str]]:
    """Yield step and name of all scalars in the event files, which are TFRecords."""
    for path in (place(workdir) / "tensorboard").children():
        content, at = path.read() if "tfevents" in path.name else b"", 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            start = at + 12  # after the length and its checksum
            event = Event.FromString(content[start : start + length])
            for value in event.summary.value:
                yield event.step, value.tag
            at = start + length + 4
