"""Batches from a prepared set, for training and for validation.

Rows have one global order, and part i of n is the i-th n-th of each batch, so that the global batch
of a step is the same, row by row, for any number of processes.
"""

import asyncio
import json
from collections.abc import Awaitable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from flowhn_jax.data.ahead import Ahead
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.utils.text import short_repr

# tokens and segment_ids, int32 [B / processes, N+1] each. The loss of position t is of predicting
# tokens[:, t + 1], and counts where `packing.target_mask` says so.
Batch = dict[str, np.ndarray]

_STATE_FILE = "batches.json"
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}; accepted is 0 to {process_count - 1}.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size is {batch_size}; accepted is a multiple of the {process_count} processes."
        )
    return batch_size // process_count


class TrainBatches(Iterator[Batch]):
    """Batches without end, shuffled over the whole set anew in every epoch.

    A checkpointable of `orbax.checkpoint.v1`: `save_checkpointables(step, dict(data=batches))`, and
    `load_checkpointables(step, dict(data=batches))` with batches made by an equal `train_batches`.
    The state is the same in every process, so that it may be loaded by any number of them.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        """See `train_batches`."""
        rows = _rows_per_process(batch_size, process_index, process_count)
        if seed < 0:
            raise ValueError(f"seed is {seed}; accepted is 0 or more.")
        # Grain shuffles epoch e by seed + e: without the hash, seed 1 would begin with the second
        # epoch of seed 0.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        windows = prepared.windows("train")

        def batched(rows_source: grain.MapDataset, rows: int) -> grain.MapDataset:
            endless = rows_source.shuffle(shuffle_seed).repeat()
            # Nothing remains of an endless set; to ask for it overflows Grain's length at one row.
            return endless.batch(rows, drop_remainder=True)

        dataset = batched(grain.MapDataset.source(windows), rows)[process_index::process_count]
        self._iterator = iter(dataset.to_iter_dataset(_READ_OPTIONS))
        self._ahead = Ahead(self._iterator)
        self._step = 0  # batches that were taken
        self._indices = batched(grain.MapDataset.range(len(windows)), batch_size)
        self._order = {"data": prepared.fingerprint, "seed": seed, "batch_size": batch_size}
        self._writes = jax.process_index() == 0

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self._step += 1
        return batch

    def error_within(self, count: int) -> Exception | None:
        """Return the error that prevents one of the next `count` batches; None: they were read."""
        return self._ahead.error_within(count)

    def get_state(self) -> dict[str, Any]:
        """How many batches were taken, and what decides their order; for JSON."""
        return self._order | {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch at which `get_state` was called.

        Raises:
          ValueError: the state is of other data, another seed or another batch size.
        """
        for key, value in self._order.items():
            if state.get(key) != value:
                raise ValueError(
                    f"The checkpoint's batches are of {key} {short_repr(state.get(key))}, but those "
                    f"asked for are of {value!r}; training goes on only with the same."
                )
        self._iterator.set_state({"next_index": state["step"]})
        self._ahead.forget()
        self._step = state["step"]

    def windows_of(self, batch: int) -> list[int]:
        """Indices of the training windows in a batch of all processes; `batch` counts from 0."""
        return self._indices[batch].tolist()

    async def save(self, directory: Any) -> Awaitable[None]:
        """Writes the state of this moment into Orbax's directory, in the background."""
        state = json.dumps(self.get_state())

        async def write() -> None:
            folder = await directory.await_creation()
            if self._writes:
                await asyncio.to_thread((folder / _STATE_FILE).write_text, state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Sets the state from Orbax's directory."""

        async def read() -> None:
            text = await asyncio.to_thread((directory / _STATE_FILE).read_text)
            self.set_state(json.loads(text))

        return read()

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._iterator.close()


def train_batches(
    prepared: PreparedSet,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches for training.

    Args:
      prepared: the set.
      batch_size: B, rows per step over all processes; a multiple of process_count.
      seed: of the shuffle, 0 or more.
      process_index: which process this is; it gets rows [i B / n, (i + 1) B / n) of every batch.
      process_count: of how many.

    Raises:
      ValueError: an argument out of range.
    """
    return TrainBatches(prepared, batch_size, seed, process_index, process_count)


def validation_batches(
    prepared: PreparedSet,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    max_windows: int | None = None,
) -> Iterator[Batch]:
    """One pass over the validation windows, in order.

    The last batch is filled up with windows that are padding throughout (segment 0), so that all
    batches have the same shape and every process has the same number of them.

    Args:
      prepared: the set.
      batch_size: B, rows per step over all processes; a multiple of process_count.
      process_index: which process this is.
      process_count: of how many.
      max_windows: at most so many windows, evenly spaced over all.

    Raises:
      ValueError: an argument out of range.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows}; accepted is 1 or more.")
    source = prepared.windows("validation")
    count = min(len(source), max_windows or len(source))
    padding = {
        "tokens": np.full(prepared.context + 1, prepared.eot_id, np.int32),
        "segment_ids": np.zeros(prepared.context + 1, np.int32),
    }

    def window(row: int) -> Batch:
        return source[row * len(source) // count] if row < count else padding

    dataset = grain.MapDataset.range(-(-count // batch_size) * batch_size).map(window)
    dataset = dataset.batch(rows)[process_index::process_count]
    return iter(dataset.to_iter_dataset(_READ_OPTIONS))
