"""The copy of shards that each host keeps."""

import errno
import io
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import namedtuple

import numpy as np
import pytest
from read_back import content, windows

from flowhn_jax.data import shard_cache, shards
from flowhn_jax.data.config import DataConfig
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.storage import bucket as bucket_lib


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return the folder in which the shards are kept."""
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def remote(bucket, jsonl, monkeypatch):
    """Return a set with several shards in a bucket."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    return prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)


def read(remote, cache="auto"):
    return windows(PreparedSet.open(remote.folder, cache), "train")[0]


def files(remote, cache):
    return content(cache / remote.fingerprint)


def test_a_second_reader_asks_the_bucket_for_no_shard(remote, cache, monkeypatch):
    first = read(remote)
    names = {shard.file for shard in remote.splits["train"].shards}
    assert len(names) > 3
    assert set(files(remote, cache)) == names  # and no validation shard
    opened = []
    kept = bucket_lib.BucketPlace.open
    monkeypatch.setattr(
        bucket_lib.BucketPlace, "open", lambda self: opened.append(self) or kept(self)
    )
    np.testing.assert_array_equal(read(remote), first)
    assert not opened
    windows(remote, "validation")
    assert [each.name for each in opened] == [
        shard.file for shard in remote.splits["validation"].shards
    ]


@pytest.mark.parametrize("harm", ["flipped", "truncated", "removed", "folder removed", "partial"])
def test_a_harmed_copy_is_made_again(remote, cache, rng, harm):
    first = read(remote)
    known = files(remote, cache)
    path = cache / remote.fingerprint / str(rng.choice(sorted(known)))
    raw = bytearray(path.read_bytes())
    if harm == "flipped":
        raw[int(rng.integers(len(raw)))] ^= 1
        path.write_bytes(raw)
    elif harm == "truncated":
        path.write_bytes(raw[: int(rng.integers(len(raw)))])
    elif harm == "removed":
        path.unlink()
    elif harm == "folder removed":
        shutil.rmtree(cache)
    else:  # as a killed process leaves it
        path.rename(path.with_name(f".{path.name}.partial"))
    np.testing.assert_array_equal(read(remote), first)
    assert files(remote, cache) == known


def test_a_damaged_shard_in_the_bucket_is_refused(remote, cache, rng):
    damaged = remote.folder / remote.splits["train"].shards[2].file
    raw = bytearray(damaged.read())
    raw[int(rng.integers(len(raw)))] ^= 1
    damaged.write_whole(bytes(raw))
    with pytest.raises(ValueError, match=rf"^{damaged} is damaged: its SHA-256 has changed\.$"):
        read(remote)
    assert damaged.name not in files(remote, cache)
    assert not any(name.endswith(".partial") for name in files(remote, cache))
    damaged.write_whole(bytes(raw[:-1]))
    with pytest.raises(ValueError, match=rf"^{damaged} has {len(raw) - 1} bytes, but {len(raw)}"):
        PreparedSet.open(remote.folder)
    damaged.remove()
    with pytest.raises(ValueError, match=rf"^{damaged} is missing, but the index names it"):
        PreparedSet.open(remote.folder)


def test_shards_that_do_not_fit_on_the_disk(remote, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    needed = sum(shard.bytes for shard in remote.splits["train"].shards)
    monkeypatch.setattr(
        shard_cache.shutil, "disk_usage", lambda path: usage(0, 0, needed - 1_000_000)
    )
    message = rf"data\.cache must have room .* lacks 1 of {needed / 1e6:,.0f} MB.*=off"
    with pytest.raises(ValueError, match=message):
        read(remote)
    assert not files(remote, cache)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: usage(0, 0, needed))
    read(remote)
    monkeypatch.setattr(shard_cache.shutil, "disk_usage", lambda path: usage(0, 0, 0))
    read(remote)  # needs no more room


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_meanwhile(remote, cache, monkeypatch, number):
    """The message names the setting where another value of it helps."""

    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_cache, "sync", fail)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        read(remote)
    assert caught.value.errno == number
    assert ("data.cache" in str(caught.value)) == (number != errno.EIO)
    assert not files(remote, cache)


def test_a_shard_is_on_the_disk_before_it_has_its_name(remote, cache, monkeypatch):
    synced, renamed = {}, []
    rename = os.replace

    def replace(partial, target):
        renamed.append(synced.pop(partial) == partial.read_bytes())
        rename(partial, target)

    monkeypatch.setattr(shard_cache, "sync", lambda path: synced.update({path: path.read_bytes()}))
    monkeypatch.setattr(shard_cache.os, "replace", replace)
    read(remote)
    assert renamed == [True] * len(files(remote, cache))


def test_the_bar_ends_at_all_bytes(remote, cache, monkeypatch):
    """For shards that are copied, for those that are there already, and for some of both."""
    bars = []

    class Bar(shard_cache.Progress):
        def close(self):
            bars.append((self.total, self.done))
            super().close()

    monkeypatch.setattr(shard_cache, "Progress", Bar)
    total = sum(shard.bytes for shard in remote.splits["train"].shards)
    for _ in range(2):
        read(remote)
    next((cache / remote.fingerprint).glob("train*")).unlink()
    read(remote)
    assert bars == [(total, total)] * 3


def _read_and_count(url, results):
    kept, opened = bucket_lib.BucketPlace.open, []
    bucket_lib.BucketPlace.open = lambda self: opened.append(self) or kept(self)
    results.put((windows(PreparedSet.open(url), "train")[0].sum(), len(opened)))


def test_processes_share_one_copy(remote, cache):
    """Of several that start at the same time, one reads the bucket and the others wait."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    readers = [
        context.Process(target=_read_and_count, args=(str(remote.folder), results))
        for _ in range(3)
    ]
    for each in readers:
        each.start()
    found = [results.get(timeout=120) for _ in readers]
    for each in readers:
        each.join()
    assert {total for total, _ in found} == {windows(remote, "train")[0].sum()}
    count = len(remote.splits["train"].shards)
    assert sorted(opened for _, opened in found) == [0, 0, count]


def test_without_a_cache_the_bucket_is_read_directly(remote, cache):
    assert shard_cache.cache_folder("off", remote.folder, remote.fingerprint) is None
    np.testing.assert_array_equal(read(remote, "off"), read(remote))
    shutil.rmtree(cache)
    read(remote, "off")
    assert not cache.exists()


def test_local_data_are_copied_only_to_a_named_folder(tmp_path, jsonl, cache):
    local = prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    read(local)
    assert not cache.exists()
    np.testing.assert_array_equal(read(local, str(tmp_path / "near")), read(local))
    assert (tmp_path / "near" / local.fingerprint / "train-00000.array_record").is_file()


def test_a_user_without_a_home(remote, monkeypatch):
    monkeypatch.delenv("FLOWHN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(shard_cache.device_cache.pathlib.Path, "home", _raise_no_home)
    with pytest.raises(ValueError, match=r"data\.cache must be a folder .*no home"):
        read(remote)


def _raise_no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("value", ["", "gs://bucket/cache", "s3://bucket/cache"])
def test_a_cache_is_a_local_folder(value):
    with pytest.raises(ValueError, match=r"data\.cache"):
        DataConfig(cache=value)


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt, also where a shell started the tests with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_copy_ends_soon_and_leaves_no_shard(remote, cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "_BLOCK", 100)
    monkeypatch.setattr(shard_cache, "_THREADS", 2)
    opened = []

    class Slow(io.BytesIO):
        def __init__(self, content):
            opened.append(self)
            super().__init__(content)

        def read(self, size=-1):
            time.sleep(0.05)  # an hour for all of it
            return super().read(min(size, 1))

    monkeypatch.setattr(bucket_lib.BucketPlace, "open", lambda self: Slow(bytes(70_000)))
    interruption = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interruption.start()
    with pytest.raises(KeyboardInterrupt):
        read(remote)
    assert files(remote, cache) == {}
    assert len(opened) == 2  # no shard is begun after the interruption
