"""Mixtures: names of sets in a config, and batches from several sets."""

import itertools
import json

import numpy as np
import pytest
from read_back import windows

from flowhn_jax.config import DataConfig
from flowhn_jax.data.interleaving import Interleaving
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.run_data import NamedSet, RunData
from tests.small import small_config

B = 4
SHARES = (0.7, 0.3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, paragraphs):
    """Return two sets of different sizes and texts: about 220 and 70 training windows."""
    folder = tmp_path_factory.mktemp("sets")
    made = []
    for name, texts in (("large", paragraphs[:40]), ("small", [t[::-1] for t in paragraphs[:14]])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made.append(prepare(str(path), "bytes", folder / name, context=32))
    return made


@pytest.fixture
def data(sets):
    return RunData(tuple(map(NamedSet, ("large", "small"), SHARES, sets)))


@pytest.fixture
def batches(data):
    """Yield a function that makes iterators over the mixture, which are closed afterwards."""
    made = []

    def make(**arguments):
        made.append(train_batches(data, **dict(batch_size=B, seed=3) | arguments))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def take(iterator, count):
    """Return the tokens of the next batches, [count, rows, N+1]."""
    return np.stack([batch["tokens"] for batch in itertools.islice(iterator, count)])


def test_a_path_of_one_set_is_left_as_it_is():
    for path in ("data/mine", "data/mine:0.5", "gs://bucket/a,b", "a=b"):
        (found,) = DataConfig(path=path).training_sets
        assert (found.name, found.path, found.weight) == ("", path, 1.0)
    assert DataConfig().training_sets == ()


def test_a_mixture_of_local_sets_and_buckets():
    config = DataConfig(
        path="gs://bucket/texts/wiki:7,code=/data/a=b:2,./books/:1",
        validation="gs://bucket/news,tests=data/other,data/date=5/c",
    )
    found = [(each.name, each.path, each.weight) for each in config.training_sets]
    assert found == [
        ("wiki", "gs://bucket/texts/wiki", 0.7),
        ("code", "/data/a=b", 0.2),
        ("books", "./books/", 0.1),
    ]
    found = [(each.name, each.path, each.weight) for each in config.validation_sets]
    assert found == [
        ("news", "gs://bucket/news", 0.0),
        ("tests", "data/other", 0.0),
        ("c", "data/date=5/c", 0.0),
    ]
    assert config.names == ("wiki", "code", "books", "news", "tests", "c")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(path="a:0.7,b"), r"^data\.path must be a folder, or PATH:WEIGHT,.*; got 'b' in"),
        (dict(path="a:0.7,:0.3"), r"^data\.path must be PATH:WEIGHT.*; got a set without a path"),
        (dict(path="x/a:0.7,y/a:0.3"), r"'x/a' and 'y/a' are both called 'a'\. Type NAME=y/a for"),
        (dict(path="a:1,b:1", validation="c/a"), r"'a' and 'c/a' are both called 'a'"),
        (dict(path="a b:1,c:1"), r"name of a set must be letters, .*; got 'a b'\. Type NAME=a b"),
        (dict(path="..:1,c:1"), r"not dots alone; got '\.\.'\. Type NAME=\.\.:WEIGHT for"),
        (dict(validation=".."), r"not dots alone; got '\.\.'\. Type NAME=\.\. for"),
        (dict(validation="a,,b"), r"^data\.validation must be NAME=PATH.*; got a set without a"),
        (dict(path="a:1,s3://b/c:1"), r"^data\.path: paths must be local .*; got 's3://b/c'"),
        (dict(validation="n=s3://b/c"), r"^data\.validation: paths must be .*; got 's3://b/c'"),
    ],
)
def test_bad_names(keys, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)


@pytest.mark.parametrize("part", ["b:0", "b:nan", "b:inf", "b:1e308"])
def test_bad_weights(part):
    with pytest.raises(ValueError, match=rf"weights above 0 and up to 1e\+09; got '{part}' in"):
        DataConfig(path=f"a:0.7,{part}")


def test_the_best_checkpoint_is_by_a_set_of_the_run():
    data = {"path": "a:1,b:1", "validation": "c"}
    for name in ("", "a", "b", "c"):
        small_config(data=data, train={"best_by": name})
    with pytest.raises(ValueError, match=r"train\.best_by must be .* one of '', a, b, c; got 'd'"):
        small_config(data=data, train={"best_by": "d"})
    with pytest.raises(ValueError, match=r"one of ''; got 'set'"):
        small_config(data={"path": "set"}, train={"best_by": "set"})


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5e-6, 1), (3, 1e-9, 2)])
def test_each_prefix_of_a_mixture_has_the_shares(weights):
    order = Interleaving(weights)
    total, counts = sum(weights), [0] * len(weights)
    for index in range(1000):
        assert order.counts(index) == counts
        chosen, position = order[index]
        assert position == counts[chosen]
        counts[chosen] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / total * (index + 1)) < len(weights)
    far = order.counts(10**12)
    assert sum(far) == 10**12
    np.testing.assert_allclose(far, np.array(weights) / total * 1e12, atol=1.1e6)


def test_every_epoch_of_a_set_has_each_of_its_windows_once(sets, batches):
    lengths = [prepared.splits["train"].windows for prepared in sets]
    iterator = batches()
    rows = take(iterator, 3 * lengths[0] // B).reshape(-1, 33)
    known = [set(map(bytes, windows(prepared, "train")[0])) for prepared in sets]
    assert known[0].isdisjoint(known[1])
    assert list(map(len, known)) == lengths  # no window is there twice
    parts = [[row for row in map(bytes, rows) if row in each] for each in known]
    assert sum(map(len, parts)) == len(rows)
    for part, each, length, share in zip(parts, known, lengths, SHARES, strict=True):
        assert abs(len(part) - share * len(rows)) < 2
        epochs = [part[i : i + length] for i in range(0, len(part) - length + 1, length)]
        assert len(epochs) >= 2
        assert all(set(epoch) == each for epoch in epochs)
        assert epochs[0] != epochs[1]
    expected = [len(part) / length for part, length in zip(parts, lengths, strict=True)]
    assert iterator.epochs() == dict(zip(("large", "small"), expected, strict=True))


def test_same_batches_for_any_number_of_processes(batches):
    alone = take(batches(), 60)
    parts = [take(batches(process_index=i, process_count=2), 60) for i in range(2)]
    assert np.array_equal(alone, np.concatenate(parts, 1))
    assert not np.array_equal(alone, take(batches(seed=4), 60))


@pytest.mark.parametrize("step", [0, 1, 57, 130])
def test_resuming_from_a_state(batches, step):
    whole = take(batches(), step + 5)
    stopped = batches()
    if step:
        take(stopped, step)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = batches()
    take(resumed, 2)
    resumed.set_state(state)
    assert np.array_equal(whole[step:], take(resumed, 5))


def test_the_windows_of_a_batch(sets, batches):
    iterator = batches()
    tokens = {each.folder.name: windows(each, "train")[0] for each in sets}
    for number, batch in enumerate(take(iterator, 40)):
        found = iterator.windows_of(number)
        rows = [tokens[name][i] for name, indices in found.items() for i in indices]
        assert sorted(map(bytes, rows)) == sorted(map(bytes, batch))


def test_the_state_of_another_mixture_is_refused(sets, data, batches):
    mixed = batches()
    for other, message in [
        (RunData.of(sets[0]), "^data.path must name the data that"),
        (RunData(data.training[::-1]), "^data.path must name the data that"),
        (
            RunData(tuple(map(NamedSet, "ab", (0.5, 0.5), sets))),
            r"^the weights in data.path must be \[0\.5, 0\.5\], as .*; got \[0\.7, 0\.3\]",
        ),
    ]:
        iterator = train_batches(other, batch_size=B, seed=3)
        with pytest.raises(ValueError, match=message):
            mixed.set_state(iterator.get_state())
        iterator.close()


def test_the_state_of_one_set_is_as_before(sets):
    """Checkpoints of runs on one set stay valid."""
    iterator = train_batches(sets[0], batch_size=B, seed=3)
    expected = {"data": sets[0].fingerprint, "seed": 3, "batch_size": B, "step": 0}
    assert iterator.get_state() == expected
    assert iterator.epochs() == {}
    iterator.close()


def test_sets_that_differ_are_refused_by_name(sets, tmp_path, jsonl, tokenizer_json):
    config = small_config(
        model={"context": 32, "vocab_size": 512},
        data={"path": f"{sets[0].folder}:1,{sets[1].folder}:2", "validation": str(tmp_path / "c")},
    )
    prepare(str(jsonl), str(tokenizer_json), tmp_path / "c", context=32)
    with pytest.raises(ValueError, match=r"must have the same tokenizer; .*/c has "):
        open_data(config, str(tmp_path))
    prepare(str(jsonl), "bytes", tmp_path / "c", context=16, overwrite=True)
    with pytest.raises(ValueError, match=r"The prepared set .*/c has a context of 16 tokens"):
        open_data(config, str(tmp_path))
    prepare(str(jsonl), "bytes", tmp_path / "c", context=32, overwrite=True)
    found = open_data(config, str(tmp_path))
    assert list(found.named) == ["large", "small", "c"]
    assert found.main.folder == sets[1].folder


def test_one_tokenizer_may_lie_at_two_paths(tmp_path, jsonl, tokenizer_json):
    paths = tokenizer_json, tmp_path / "copy.json"
    paths[1].write_bytes(tokenizer_json.read_bytes())
    for name, path in zip("ab", paths, strict=True):
        prepare(str(jsonl), str(path), tmp_path / name, context=32)
    config = small_config(
        model={"context": 32, "vocab_size": 512},
        data={"path": f"{tmp_path}/a:1,{tmp_path}/b:1"},
    )
    assert open_data(config, str(tmp_path)).is_mixture


def test_forgotten_weights_are_named(tmp_path):
    config = small_config(data={"path": f"{tmp_path}/a,{tmp_path}/b"})
    with pytest.raises(FileNotFoundError, match=r"not exist \(several sets need weights: A:0\.7,"):
        open_data(config, str(tmp_path))
