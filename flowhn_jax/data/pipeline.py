"""Batches from a prepared set, for training and for validation.

Rows have one global order, and process i of n reads the i-th n-th of each batch, so that the global
batch of a step has the same rows for any number of processes.
"""

import asyncio
import json
from collections.abc import Awaitable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.utils.text import short_repr

# A batch in host memory: tokens and segment_ids, int32 [B / processes, N+1] each. The loss at
# position t is that of predicting tokens[:, t + 1]; it counts if `packing.target_mask` is true.
NumpyBatch = dict[str, np.ndarray]

_STATE_FILE = "batches.json"
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class TrainBatches(Iterator[NumpyBatch]):
    """An endless iterator over batches, which shuffles the whole set again in every epoch.

    It is a checkpointable of `orbax.checkpoint.v1`: save it by
    `save_checkpointables(step, dict(data=batches))`, and load it by
    `load_checkpointables(step, dict(data=batches))` with the result of an equal `train_batches`.
    The state is the same in every process, so that any number of processes can load it.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
    ):
        """Open the windows; see `train_batches`."""
        rows = _rows_per_process(batch_size, process_index, process_count)
        if seed < 0:
            raise ValueError(f"seed must be 0 or more; got {seed}.")
        # Grain shuffles epoch e by seed + e: without the hash, seed 1 would begin with the second
        # epoch of seed 0.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        windows = prepared.windows("train")

        def batched(rows_source: grain.MapDataset, rows: int) -> grain.MapDataset:
            endless = rows_source.shuffle(shuffle_seed).repeat()
            # An endless set has no remainder; computing one overflows Grain's length for one row.
            return endless.batch(rows, drop_remainder=True)

        dataset = batched(grain.MapDataset.source(windows), rows)[process_index::process_count]
        self._iterator = iter(dataset.to_iter_dataset(_READ_OPTIONS))
        self._lookahead = Lookahead(self._iterator)
        self._step = 0  # batches that were taken
        self._indices = batched(grain.MapDataset.range(len(windows)), batch_size)
        self._order = {"data": prepared.fingerprint, "seed": seed, "batch_size": batch_size}
        self._writes = jax.process_index() == 0

    def __next__(self) -> NumpyBatch:
        batch = next(self._lookahead)
        self._step += 1
        return batch

    def error_within(self, count: int) -> Exception | None:
        """Return the error that prevents one of the next `count` batches, or None."""
        return self._lookahead.error_within(count)

    def pop_waited(self) -> float:
        """Return the seconds for which batches were waited for since the last call."""
        return self._lookahead.pop_waited()

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches taken and what determines their order, as JSON values."""
        return self._order | {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue with the batch that followed when `get_state` was called.

        Raises:
          ValueError: the state belongs to other data, another seed or another batch size.
        """
        for key, value in self._order.items():
            if state.get(key) != value:
                raise ValueError(
                    f"{key} must stay the same when training resumes: the checkpoint's batches "
                    f"have {short_repr(state.get(key))}, but this run has {value!r}."
                )
        self._iterator.set_state({"next_index": state["step"]})
        self._lookahead.clear()
        self._step = state["step"]

    def windows_of(self, batch: int) -> list[int]:
        """Return the indices of the windows in global batch number `batch`, counted from 0."""
        indices = self._indices[batch]
        assert indices is not None  # only a filtered dataset has elements that are None
        return indices.tolist()

    async def save(self, directory: Any) -> Awaitable[None]:
        """Return the background task that writes the current state into Orbax's directory."""
        state = json.dumps(self.get_state())

        async def write() -> None:
            folder = await directory.await_creation()
            if self._writes:
                await asyncio.to_thread((folder / _STATE_FILE).write_text, state)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        """Return the task that sets the state from Orbax's directory."""

        async def read() -> None:
            text = await asyncio.to_thread((directory / _STATE_FILE).read_text)
            self.set_state(json.loads(text))

        return read()

    def close(self) -> None:
        """Stop the threads that prefetch."""
        self._iterator.close()


def train_batches(
    prepared: PreparedSet,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Return an endless iterator over batches for training.

    Args:
      prepared: the set.
      batch_size: B, rows per step over all processes; a multiple of process_count.
      seed: of the shuffle, 0 or more.
      process_index: this process, which gets rows [i B / n, (i + 1) B / n) of every batch.
      process_count: the number of processes.

    Raises:
      ValueError: an argument is out of range.
    """
    return TrainBatches(prepared, batch_size, seed, process_index, process_count)


def validation_batches(
    prepared: PreparedSet,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    max_windows: int | None = None,
) -> Iterator[NumpyBatch]:
    """Return an iterator over the validation windows, once and in order.

    The last batch is filled with windows of padding only (segment 0), so that all batches have the
    same shape and every process has the same number of them.

    Args:
      prepared: the set.
      batch_size: B, rows per step over all processes; a multiple of process_count.
      process_index: this process.
      process_count: the number of processes.
      max_windows: read at most this many windows, evenly spaced over the split.

    Raises:
      ValueError: an argument is out of range.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be 1 or more; got {max_windows}.")
    source = prepared.windows("validation")
    count = min(len(source), max_windows or len(source))
    padding = {
        "tokens": np.full(prepared.context + 1, prepared.eot_id, np.int32),
        "segment_ids": np.zeros(prepared.context + 1, np.int32),
    }

    def window(row: int) -> NumpyBatch:
        return source[row * len(source) // count] if row < count else padding

    dataset = grain.MapDataset.range(-(-count // batch_size) * batch_size).map(window)
    dataset = dataset.batch(rows)[process_index::process_count]
    return iter(dataset.to_iter_dataset(_READ_OPTIONS))


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be from 0 to {process_count - 1}; got {process_index}."
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} processes; "
            f"got {batch_size}."
        )
    return batch_size // process_count
