"""Batches from prepared sets, for training and for validation.

Rows have one global order, and process i of n reads the i-th of n equal slices of each batch, so
that the global batch of a step has the same rows for any number of processes.
"""

import asyncio
import json
from collections.abc import Awaitable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from flowhn_jax.data.interleaving import Interleaving
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.run_data import RunData
from flowhn_jax.utils.text import short_repr

# A batch in host memory: tokens and segment_ids, int32 [B / processes, N+1] each. The loss at
# position t is that of predicting tokens[:, t + 1]; it counts if `packing.target_mask` is true.
NumpyBatch = dict[str, np.ndarray]

_STATE_FILE = "batches.json"
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)

# What determines the order of the batches, by the names in a checkpoint.
_KEYS = {
    "seed": "data.seed",
    "batch_size": "train.batch_size",
    "weights": "the weights in data.path",
}


class TrainBatches(Iterator[NumpyBatch]):
    """An endless iterator over batches, which shuffles a set again in each of its epochs.

    It is a checkpointable of `orbax.checkpoint.v1`: save it by
    `save_checkpointables(step, dict(data=batches))`, and load it by
    `load_checkpointables(step, dict(data=batches))` with the result of an equal `train_batches`.
    The state is the same in every process, so that any number of processes can load it.
    """

    def __init__(
        self,
        data: RunData,
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
        # epoch of seed 0. The sets of a mixture have seeds of their own.
        sequences = [np.random.SeedSequence(seed)]
        if data.is_mixture:
            sequences = sequences[0].spawn(len(data.training))
        seeds = [int(sequence.generate_state(1)[0]) for sequence in sequences]
        windows = [each.prepared.windows("train") for each in data.training]
        self._interleaving = Interleaving([each.weight for each in data.training])

        def batched(sources: list[grain.MapDataset], rows: int) -> grain.MapDataset:
            endless = [
                source.shuffle(shuffle_seed).repeat()
                for source, shuffle_seed in zip(sources, seeds, strict=True)
            ]
            mixed = endless[0]
            if data.is_mixture:
                mixed = grain.MapDataset.select_from_datasets(endless, self._interleaving)
            # An endless set has no remainder; computing one overflows Grain's length for one row.
            return mixed.batch(rows, drop_remainder=True)

        dataset = batched([grain.MapDataset.source(each) for each in windows], rows)
        dataset = dataset[process_index::process_count]
        self._iterator = iter(dataset.to_iter_dataset(_READ_OPTIONS))
        self._lookahead = Lookahead(self._iterator)
        self._step = 0  # batches that were taken
        self._names = [each.name for each in data.training]
        self._lengths = [len(each) for each in windows]
        # A window's number counts those of the sets before its own.
        self._starts = np.cumsum([0, *self._lengths])
        numbers = zip(self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)
        self._indices = batched([grain.MapDataset.range(*each) for each in numbers], batch_size)
        self._batch_size = batch_size
        self._order: dict[str, Any] = {"data": data.training[0].prepared.fingerprint}
        if data.is_mixture:
            self._order["data"] = [each.prepared.fingerprint for each in data.training]
            self._order["weights"] = [each.weight for each in data.training]
        self._order |= {"seed": seed, "batch_size": batch_size}
        self._writes = jax.process_index() == 0

    def __next__(self) -> NumpyBatch:
        batch = next(self._lookahead)
        self._step += 1
        return batch

    def error_within(self, count: int) -> Exception | None:
        """Return the error that prevents one of the next `count` batches, or None."""
        return self._lookahead.error_within(count)

    def pop_waited(self) -> float:
        """Return the seconds spent waiting since the last call."""
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
                if key == "data":
                    raise ValueError(
                        "data.path must name the data that the checkpoint was trained on; these "
                        "are other data."
                    )
                raise ValueError(
                    f"{_KEYS[key]} must be {short_repr(state.get(key))}, as in the checkpoint; got "
                    f"{short_repr(value)}."
                )
        self._iterator.set_state({"next_index": state["step"]})
        self._lookahead.clear()
        self._step = state["step"]

    def windows_of(self, batch: int) -> list[int] | dict[str, list[int]]:
        """Return the indices of the windows in global batch number `batch`, counted from 0.

        Those of a mixture are grouped by the names of the sets.
        """
        indices = self._indices[batch]
        assert indices is not None  # only a filtered dataset has elements that are None
        if len(self._names) == 1:
            return indices.tolist()
        sets = np.searchsorted(self._starts, indices, side="right") - 1
        return {
            name: (indices[sets == i] - self._starts[i]).tolist()
            for i, name in enumerate(self._names)
        }

    def epochs(self) -> dict[str, float]:
        """Return how often the batches taken so far went through each set of a mixture, by name."""
        if len(self._names) == 1:
            return {}
        counts = self._interleaving.counts(self._step * self._batch_size)
        return {
            name: count / length
            for name, count, length in zip(self._names, counts, self._lengths, strict=True)
        }

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
    data: RunData | PreparedSet,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Return an endless iterator over batches for training.

    Args:
      data: the sets of a run, which alternate by their weights, or one set.
      batch_size: B, rows per step over all processes; a multiple of process_count.
      seed: the seed of the shuffle, 0 or more.
      process_index: this process, which gets rows [i B / n, (i + 1) B / n) of every batch.
      process_count: the number of processes.

    Raises:
      ValueError: an argument is out of range.
    """
    data = RunData.of(data) if isinstance(data, PreparedSet) else data
    return TrainBatches(data, batch_size, seed, process_index, process_count)


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
