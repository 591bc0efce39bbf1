"""Prepared sets in a bucket: made, continued after a kill, replaced, read."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from read_back import ENVIRONMENT, content, windows

from flowhn_jax.data import encoding, shards
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepare import ShardsMissing, ensure_embedded, prepare
from flowhn_jax.data.prepare import upload as upload_lib
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.storage import place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder for what is kept on the machine."""
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_shards(monkeypatch):
    """Let a set of the paragraphs have several shards."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)


@pytest.fixture
def local(tmp_path, jsonl, small_shards):
    """Return a local set."""
    return prepare(str(jsonl), "bytes", tmp_path / "local", context=32)


def objects(url):
    return {name: file.read() for name, file in place(url).walk()}


def state_after(prepared, steps):
    batches = train_batches(prepared, batch_size=8, seed=3)
    taken = [next(batches)["tokens"] for _ in range(steps)]
    state = batches.get_state()
    batches.close()
    return np.stack(taken), state


def test_a_set_is_that_of_a_local_preparation(bucket, cache, jsonl, local):
    made = prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    assert objects(f"{bucket}/set") == content(local.folder.local())
    assert len(local.splits["train"].shards) > 3
    assert made.fingerprint == local.fingerprint
    for split in ("train", "validation"):
        for ours, theirs in zip(windows(made, split), windows(local, split), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    (ours, our_state), (theirs, their_state) = state_after(made, 20), state_after(local, 20)
    np.testing.assert_array_equal(ours, theirs)
    assert our_state == their_state
    assert not list((cache / "uploads").iterdir())


def test_a_tokenizer_in_a_bucket(bucket, tmp_path, jsonl, tokenizer_json):
    (place(bucket) / "tok" / "tokenizer.json").copy_from(tokenizer_json)
    settings = json.dumps({"add_bos_token": True, "bos_token": "<|endoftext|>"})
    (place(bucket) / "tok" / "tokenizer_config.json").write_whole(settings)
    made = prepare(str(jsonl), f"{bucket}/tok/tokenizer.json", f"{bucket}/set", context=32)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    local = prepare(str(jsonl), str(tmp_path / "tokenizer.json"), tmp_path / "set", context=32)
    assert made.fingerprint == local.fingerprint
    assert made.first_token == local.first_token
    text = "Ægir är en jätte"
    assert made.tokenizer.encode(text).tolist() == local.tokenizer.encode(text).tolist()


def test_two_hosts_that_share_only_the_bucket(bucket, tmp_path, jsonl, local, monkeypatch):
    """The parts are exchanged there; the last host makes the set, and removes them."""
    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)
    out = f"{bucket}/set"

    def on_host(number):
        monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / f"host_{number}"))
        return prepare(str(jsonl), "bytes", out, context=32, shard=f"{number}/2")

    with pytest.raises(ShardsMissing, match=r"Shard 1/2 of .* missing are 0/2\."):
        on_host(1)
    assert not list((tmp_path / "host_1/uploads").iterdir())
    assert ".set.parts-1-of-2/complete.json" in objects(bucket)
    with monkeypatch.context() as patched:
        patched.setattr("flowhn_jax.data.prepare.parts.encode", None)  # nothing is encoded again
        with pytest.raises(ShardsMissing):
            on_host(1)
    made = on_host(0)
    expected = content(local.folder.local())
    assert objects(bucket) == {f"set/{name}": raw for name, raw in expected.items()}
    assert on_host(1) == made
    for number in range(2):
        assert not list((tmp_path / f"host_{number}/uploads").iterdir())


def test_the_same_command_uses_the_set(bucket, jsonl, capsys):
    first = prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    known = place(f"{bucket}/set").checksums()
    assert prepare(str(jsonl), "bytes", f"{bucket}/set", context=32) == first
    assert f"Using {bucket}/set, which was already prepared" in capsys.readouterr().err
    assert place(f"{bucket}/set").checksums() == known


def test_another_set_is_replaced_only_on_request(bucket, tmp_path, jsonl, tokenizer_json):
    out = f"{bucket}/set"
    prepare(str(jsonl), str(tokenizer_json), out, context=16)
    with pytest.raises(ValueError, match=r"context: has 16, requested 32.*--overwrite"):
        prepare(str(jsonl), "bytes", out, context=32)
    prepare(str(jsonl), "bytes", out, context=32, overwrite=True)
    prepare(str(jsonl), "bytes", tmp_path / "local", context=32)
    assert objects(out) == content(tmp_path / "local")


def test_a_folder_with_something_else_is_left_unchanged(bucket, jsonl):
    (place(bucket) / "set" / "mine.txt").write_whole("mine")
    with pytest.raises(ValueError, match=r"left unchanged: .*it has no index\.json"):
        prepare(str(jsonl), "bytes", f"{bucket}/set", overwrite=True)
    assert objects(f"{bucket}/set") == {"mine.txt": b"mine"}


# Prepares, and is killed by its COUNT-th request that writes or removes an object.
KILLED = """
import os, signal, sys
from flowhn_jax.data import shards
from flowhn_jax.data.prepare import prepare, upload
from flowhn_jax.storage.bucket import BucketPlace

shards.SHARD_BYTES = 4000
upload._THREADS = 1
source, out, overwrite, count, moment = sys.argv[1:]
calls = []

def killing(name):
    function = getattr(BucketPlace, name)
    def call(*arguments):
        calls.append(name)
        if len(calls) == int(count) and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(BucketPlace, name, call)

for name in ("copy_from", "write_whole", "remove"):
    killing(name)
prepare(source, "bytes", out, context=32, overwrite=bool(overwrite))
print(len(calls))
"""


def run_until_killed(jsonl, out, count, moment, overwrite=""):
    arguments = [str(jsonl), out, overwrite, str(count), moment]
    environment = ENVIRONMENT | os.environ
    return subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_a_random_moment_of_the_upload(bucket, cache, jsonl, local, rng, replaces):
    """A set is there whole or not at all, and the same command completes it."""
    expected = content(local.folder.local())
    requests = len(expected) + 3
    out, overwrite = f"{bucket}/set", "yes" if replaces else ""
    before = {}
    for count in [*rng.choice(np.arange(1, requests), 2, replace=False).tolist(), requests]:
        place(out).remove_tree()
        if replaces:
            prepare(str(jsonl), "bytes", out, context=16)
            before = objects(out)
        done = run_until_killed(jsonl, out, count, str(rng.choice(["before", "after"])), overwrite)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        found = objects(out)
        assert all(found[name] in (expected.get(name), before.get(name), b"") for name in found)
        if "index.json" in found:
            index = found.pop("index.json")
            whole = expected if index == expected["index.json"] else before
            assert index == whole["index.json"]
            names = set(whole) - {"index.json"}
            assert {name: found[name] for name in names} == {name: whole[name] for name in names}
        else:
            with pytest.raises((ValueError, FileNotFoundError), match="set"):
                PreparedSet.open(out)
        prepare(str(jsonl), "bytes", out, context=32, overwrite=replaces)
        assert objects(out) == expected
        assert not list((cache / "uploads").iterdir())


def test_what_was_uploaded_is_not_sent_again(bucket, jsonl, local, monkeypatch):
    done = run_until_killed(jsonl, f"{bucket}/set", 4, "after")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "index.json" not in objects(f"{bucket}/set")
    sent, kept = [], type(place(bucket)).copy_from

    def copy_from(self, source):
        sent.append(source.name)
        kept(self, source)

    monkeypatch.setattr(type(place(bucket)), "copy_from", copy_from)
    monkeypatch.setattr("flowhn_jax.data.prepare.preparation.write_splits", None)  # nor made again
    prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    assert len(sent) == len(content(local.folder.local())) - 2
    assert sent[-1] == "index.json"
    assert objects(f"{bucket}/set") == content(local.folder.local())


def test_an_interrupted_upload_says_how_to_continue(bucket, cache, jsonl, monkeypatch):
    def interrupted(folder, out):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(upload_lib, "_upload", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the same command continues the upload"):
            prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    assert list((cache / "uploads").glob("*/set/index.json"))


def test_the_embedded_corpus_of_a_run_in_a_bucket(bucket, tmp_path, monkeypatch):
    texts = {"a.py": b"print(1)\n" * 300, "b.py": b"x = 2\n" * 200}
    monkeypatch.setattr("flowhn_jax.data.corpus.embedded_documents", lambda: texts)
    made = ensure_embedded(f"{bucket}/run/data", 32)
    assert objects(f"{bucket}/run/data") == content(
        ensure_embedded(tmp_path / "data", 32).folder.local()
    )
    assert ensure_embedded(f"{bucket}/run/data", 32) == made


def test_the_config_names_the_set_and_the_cache(bucket, tmp_path, jsonl, local):
    from tests.small import small_config

    prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    data = {"path": f"{bucket}/set", "cache": str(tmp_path / "near")}
    config = small_config(model={"context": 32}, data=data)
    prepared = open_data(config, str(tmp_path / "run")).main
    np.testing.assert_array_equal(windows(prepared, "train")[0], windows(local, "train")[0])
    names = {shard.file for shard in local.splits["train"].shards}
    assert set(content(tmp_path / "near" / local.fingerprint)) == names
