import json
import shutil

import numpy as np
import pytest

from flowhn_jax.data.prepared import PreparedSet


@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of the set, to be damaged."""
    shutil.copytree(prepared.folder, tmp_path / "set")
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
        with pytest.raises(IndexError, match=f"Window {index} of {len(windows)}"):
            windows[index]


def test_fingerprint_is_of_the_content(prepared, copy):
    copied = PreparedSet.open(copy)
    assert copied.fingerprint == prepared.fingerprint
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["validation"]["shards"][0]["sha256"] = "0"
    (copy / "index.json").write_text(json.dumps(index))
    assert PreparedSet.open(copy).fingerprint != prepared.fingerprint


def test_absent_and_foreign_folders(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match=r"No prepared data at .*flowhn_jax\.data\.prepare"):
        PreparedSet.open(tmp_path / "absent")
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="not a prepared set: it has no index"):
        PreparedSet.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:200], "is damaged"),
        (lambda text: "[]", "not the index of a prepared set"),
        (lambda text: text.replace("flowhn token", "other token"), "not the index"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "of version 2; accepted is 1"),
        (lambda text: text.replace('"eot_id"', '"eot"'), "does not describe a prepared set.*eot"),
        (
            lambda text: text.replace('"records"', '"rows"'),
            "does not describe a prepared set.*rows",
        ),
    ],
)
def test_bad_index(copy, change, message):
    index = copy / "index.json"
    index.write_text(change(index.read_text()))
    with pytest.raises(ValueError, match=message):
        PreparedSet.open(copy)


def test_missing_shard(copy, shard):
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.array_record is missing"):
        PreparedSet.open(copy)


def test_truncated_shard(copy, shard):
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00000\.array_record has \d+ bytes, but \d+"):
        PreparedSet.open(copy)


def test_foreign_shard(copy, shard):
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is not an ArrayRecord file"):
        PreparedSet.open(copy)


def test_shard_with_other_records(copy, shard):
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["records"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has \d+ windows, but \d+ were written"):
        PreparedSet.open(copy)


def test_records_of_another_context(copy):
    index = json.loads((copy / "index.json").read_text())
    index["context"] = 31
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="132 bytes are not 32 tokens"):
        PreparedSet.open(copy).windows("train")[0]


def test_flipped_bit(copy, shard):
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 4] ^= 1
    shard.write_bytes(raw)
    opened = PreparedSet.open(copy)
    with pytest.raises(ValueError, match=r"train-00000\.array_record is damaged"):
        opened.verify()
    windows = opened.windows("train")
    with pytest.raises(ValueError, match=r"Window \d+ of .*set, train, is damaged"):
        [windows[i] for i in range(len(windows))]


def test_another_tokenizer_file(tmp_path, jsonl, tokenizer_json):
    from flowhn_jax.data.prepare import prepare

    made = prepare(str(jsonl), str(tokenizer_json), tmp_path / "set")
    path = made.folder / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="not the tokenizer that the set was made with"):
        PreparedSet.open(made.folder).tokenizer  # noqa: B018
