import json
import os
import shutil

import numpy as np
import pytest

from flowhn_jax.data.prepared import PreparedSet


@pytest.fixture
def copy(prepared, tmp_path):
    """Return a copy of the set that a test may damage."""
    shutil.copytree(prepared.folder.local(), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def shard(copy):
    return copy / "train-00000.array_record"


def test_windows(prepared):
    windows = prepared.windows("train")
    assert len(windows) == prepared.splits["train"].windows
    for key in ("tokens", "segment_ids"):
        assert windows[0][key].shape == (33,)
        assert windows[0][key].dtype == np.int32
    for index in (-1, len(windows)):
        with pytest.raises(IndexError, match=f"must be from 0 to {len(windows) - 1}; got {index}"):
            windows[index]


def test_the_fingerprint_depends_only_on_the_content(prepared, copy):
    copied = PreparedSet.open(copy)
    assert copied.fingerprint == prepared.fingerprint
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["validation"]["shards"][0]["sha256"] = "0"
    (copy / "index.json").write_text(json.dumps(index))
    assert PreparedSet.open(copy).fingerprint != prepared.fingerprint


def test_folders_that_are_not_prepared_sets(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match=r"absent of prepared .*flowhn_jax\.data\.prepare"):
        PreparedSet.open(tmp_path / "absent")
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="not a prepared set: it has no index"):
        PreparedSet.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:200], "is damaged"),
        (lambda text: "[" * 100_000, "is damaged: .*nested too deeply"),
        (lambda text: text + "\xff", "is damaged"),
        (lambda text: "[]", "not the index of a prepared set"),
        (lambda text: text.replace("flowhn token", "other token"), "not the index"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "must be 1; got 2"),
        (lambda text: text.replace('"eot_id"', '"eot"'), "does not describe a prepared set.*eot"),
        (
            lambda text: text.replace('"records"', '"rows"'),
            "does not describe a prepared set.*rows",
        ),
        (
            lambda text: text.replace('"windows": ', '"windows": 1'),
            "the counts of the train split are inconsistent",
        ),
        (lambda text: text.replace('"eot_id": 256', '"eot_id": 257'), "eot_id cannot be 257"),
        (
            lambda text: text.replace('"eot_id": 256', '"eot_id": "256"'),
            r"eot_id must be int; got '256' .str.",
        ),
        (
            lambda text: text.replace("32,", "1e30,"),
            r"context must be at most 9223\d+; got 10\d{29}",
        ),
        (lambda text: text.replace('"<u2"', '"<u9"'), "token_dtype cannot be '<u9'"),
        (lambda text: text.replace('"validation": {', '"more": {'), "splits cannot be"),
    ],
)
def test_bad_index(copy, change, message):
    index = copy / "index.json"
    index.write_text(change(index.read_text()))
    with pytest.raises(ValueError, match=message):
        PreparedSet.open(copy)


def test_a_missing_shard(copy, shard):
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.array_record is missing"):
        PreparedSet.open(copy)


def test_a_truncated_shard(copy, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00000\.array_record has \d+ bytes, but \d+"):
        PreparedSet.open(copy)


def test_a_shard_that_is_not_an_array_record(copy, shard):
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is not an ArrayRecord file"):
        PreparedSet.open(copy)


def test_a_shard_with_another_number_of_records(copy, shard):
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["records"] += 1
    index["splits"]["train"]["windows"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has \d+ windows, but \d+ were written"):
        PreparedSet.open(copy)


@pytest.mark.parametrize("folder", ["../other/", "{tmp_path}/other/", "./", "../set/"])
def test_shards_outside_the_folder_are_refused(copy, shard, tmp_path, folder):
    (tmp_path / "other").mkdir()
    shutil.copy(shard, tmp_path / "other")
    name = folder.format(tmp_path=tmp_path) + shard.name
    index = copy / "index.json"
    index.write_text(index.read_text().replace(f'"{shard.name}"', json.dumps(name)))
    with pytest.raises(ValueError, match="must name only files in this folder"):
        PreparedSet.open(copy)


def test_files_that_change_while_they_are_read(copy, shard):
    opened = PreparedSet.open(copy)
    windows = opened.windows("train")
    raw = shard.read_bytes()
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"Window \d+ of the train split in .*set is damaged"):
        [windows[i] for i in range(len(windows))]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is missing"):
        opened.windows("train")


def test_a_token_outside_the_vocabulary(copy):
    index = copy / "index.json"
    text = index.read_text().replace('"vocab_size": 257', '"vocab_size": 100')
    index.write_text(text.replace('"eot_id": 256', '"eot_id": 99'))
    with pytest.raises(
        ValueError, match=r"is damaged: it has token id \d+, but the vocabulary size is 100"
    ):
        PreparedSet.open(copy).windows("train")[0]


def test_records_of_another_context(copy):
    index = json.loads((copy / "index.json").read_text())
    index["context"] = 31
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its 132 bytes do not hold 32 tokens"):
        PreparedSet.open(copy).windows("train")[0]


def test_a_flipped_bit(copy, shard):
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 4] ^= 1
    shard.write_bytes(raw)
    opened = PreparedSet.open(copy)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is damaged"):
        opened.verify()
    windows = opened.windows("train")
    with pytest.raises(ValueError, match=r"Window \d+ of the train split in .*set is damaged"):
        [windows[i] for i in range(len(windows))]


def test_another_tokenizer_file(tmp_path, jsonl, tokenizer_json):
    from flowhn_jax.data.prepare import prepare

    made = prepare(str(jsonl), str(tokenizer_json), tmp_path / "set")
    path = made.folder.local() / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="not the tokenizer that the set was prepared with"):
        PreparedSet.open(made.folder).tokenizer  # noqa: B018
