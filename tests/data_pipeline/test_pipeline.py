import itertools
import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from read_back import windows

from flowhn_jax.data.pipeline import train_batches, validation_batches

B = 8


@pytest.fixture
def batches(prepared):
    """Yield a function that makes iterators, which are closed afterwards."""
    made = []

    def make(**arguments):
        made.append(train_batches(prepared, **dict(batch_size=B, seed=3) | arguments))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def take(iterator, count):
    """Return the next batches stacked: tokens and segment ids, [count, rows, N+1]."""
    found = list(itertools.islice(iterator, count))
    if not found:
        return ()
    return tuple(np.stack([batch[key] for batch in found]) for key in ("tokens", "segment_ids"))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def rows(tokens):
    return sorted(map(tuple, tokens.reshape(-1, tokens.shape[-1]).tolist()))


def test_batch(batches):
    batch = next(batches())
    assert set(batch) == {"tokens", "segment_ids"}
    for array in batch.values():
        assert array.shape == (B, 33)
        assert array.dtype == np.int32


def test_every_epoch_has_every_window_once_in_a_new_order(prepared, batches):
    count = prepared.splits["train"].windows
    tokens, segments = take(batches(batch_size=1), 2 * count)
    expected = windows(prepared, "train")
    for found, known in zip((tokens, segments), expected, strict=True):
        assert rows(found[:count]) == rows(found[count:]) == rows(known)
    assert not np.array_equal(tokens[:count], tokens[count:])
    assert not np.array_equal(tokens[:count, 0], expected[0])


def test_a_batch_may_span_two_epochs(prepared, batches):
    one_by_one = take(batches(batch_size=1), 3 * B * 40)
    together = take(batches(), 3 * 40)
    assert prepared.splits["train"].windows < B * 120
    assert prepared.splits["train"].windows % B
    assert equal([x.reshape(-1, 33) for x in one_by_one], [x.reshape(-1, 33) for x in together])


def test_the_order_depends_only_on_the_seed(prepared, batches):
    first = take(batches(), 5)
    assert equal(first, take(batches(), 5))
    assert not equal(first, take(batches(seed=4), 5))
    # The second epoch of a seed differs from the first epoch of the next seed.
    count = prepared.splits["train"].windows
    second_epoch = take(batches(batch_size=1), count + 5)[0][count:]
    assert not np.array_equal(second_epoch, take(batches(batch_size=1, seed=4), 5)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_same_batches_for_any_number_of_processes(batches, processes):
    alone = take(batches(), 100)  # some epochs
    parts = [take(batches(process_index=i, process_count=processes), 100) for i in range(processes)]
    assert equal(alone, [np.concatenate(part, 1) for part in zip(*parts, strict=True)])


@pytest.mark.parametrize("step", [0, 7, 45, 100])  # an epoch has about 37 batches
def test_resuming_from_a_state(prepared, batches, step):
    assert 30 < prepared.splits["train"].windows / B < 45
    whole = take(batches(), step + 5)
    stopped = batches()
    take(stopped, step)
    state = json.loads(json.dumps(stopped.get_state()))
    take(stopped, 3)  # does not affect the saved state
    resumed = batches()
    take(resumed, 2)
    resumed.set_state(state)
    assert equal([x[step:] for x in whole], take(resumed, 5))
    assert resumed.get_state()["step"] == step + 5


def test_orbax(tmp_path, batches):
    whole = take(batches(), 50)
    stopped = batches()
    take(stopped, 40)
    with ocp.v1.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(40, dict(state={"w": np.arange(3.0)}, data=stopped))
        next(stopped)
    for processes in (1, 2):  # any number of processes may resume
        parts = []
        for index in range(processes):
            resumed = batches(process_index=index, process_count=processes)
            with ocp.v1.training.Checkpointer(tmp_path) as checkpointer:
                loaded = checkpointer.load_checkpointables(40, dict(state=None, data=resumed))
            assert loaded["data"] is resumed
            assert np.array_equal(loaded["state"]["w"], np.arange(3.0))
            parts.append(take(resumed, 10))
        found = [np.concatenate(part, 1) for part in zip(*parts, strict=True)]
        assert equal([x[40:] for x in whole], found)


@pytest.mark.parametrize("change", [dict(seed=4), dict(batch_size=4)])
def test_the_state_of_another_order_is_refused(batches, change):
    state = batches(**change).get_state()
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=rf"\.{key} must be {value}, as in the checkpoint; got"):
        batches().set_state(state)


def test_the_state_of_other_data_is_refused(batches):
    state = batches().get_state() | {"data": "other"}
    with pytest.raises(ValueError, match=r"data.path must name the data that the checkpoint was"):
        batches().set_state(state)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("max_windows", [None, 1, 10, 10**6])
def test_validation(prepared, count, max_windows):
    known = windows(prepared, "validation")
    total = min(len(known[0]), max_windows or 10**6)
    parts = []
    for index in range(count):
        iterator = validation_batches(
            prepared,
            batch_size=B,
            process_index=index,
            process_count=count,
            max_windows=max_windows,
        )
        parts.append(take(iterator, 10**6))
        assert parts[-1][0].shape == (-(-total // B), B // count, 33)
        assert parts[-1][0].dtype == parts[-1][1].dtype == np.int32
    tokens, segments = (np.concatenate(x, 1).reshape(-1, 33) for x in zip(*parts, strict=True))
    assert (segments[total:] == 0).all()
    assert (tokens[total:] == prepared.eot_id).all()
    assert len(tokens) % B == 0
    if total == len(known[0]):
        assert total % B  # there is padding
        assert equal([tokens[:total], segments[:total]], known)
        assert (segments[:, 1:] != 0).sum() == prepared.splits["validation"].tokens
    else:  # evenly spaced
        every = [row * len(known[0]) // total for row in range(total)]
        assert equal([tokens[:total], segments[:total]], [x[every] for x in known])


@pytest.mark.parametrize("make", [train_batches, validation_batches])
def test_bad_arguments(prepared, make):
    seed = dict(seed=0) if make is train_batches else {}
    for arguments, message in [
        (dict(batch_size=0), "batch_size must be .*; got 0"),
        (dict(batch_size=6, process_count=4), "a positive multiple of the 4 processes; got 6"),
        (
            dict(batch_size=4, process_count=4, process_index=4),
            "process_index must be from 0 to 3; got 4",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make(prepared, **seed | arguments)
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"):
        train_batches(prepared, batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="max_windows must be 1 or more; got 0"):
        validation_batches(prepared, batch_size=1, max_windows=0)
