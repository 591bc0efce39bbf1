"""Answers of a store that refuses or fails, where data are read and written."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
from read_back import content, windows

from flowhn_jax.commands import prepare as command
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.prompt_files import read_prompts
from flowhn_jax.evaluation.task_files import find_file
from flowhn_jax.interop import huggingface
from flowhn_jax.storage import StorageError, requests
from tests.storage.emulator import used
from tools.faults import FaultyStore


@pytest.fixture
def clock(monkeypatch):
    """Let pauses pass at once; return the list with the time."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(requests, "sleep", sleep)
    monkeypatch.setattr(requests, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


@contextlib.contextmanager
def refusing(emulator, *codes, share=1.0):
    """Yield a proxy of the emulator that answers with these codes."""
    with FaultyStore(emulator, np.random.SeedSequence().entropy) as store:
        store.refuse(*codes, share=share)
        yield store


USES = {
    "source": open_source,
    "tokenizer": load_tokenizer,
    "set": PreparedSet.open,
    "out": lambda url: prepare("embedded", "bytes", url),
    "model": huggingface.load,
    "prompts": read_prompts,
    "tasks": lambda url: find_file("piqa", url),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("code", "seconds"), [(403, 20), (429, 120), (503, 120), (400, 0)])
def test_an_answer_that_stays_is_one_message(
    use, code, seconds, emulator, clock, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    message = rf"gs://bucket/x\S* failed: {code} .*refused by the proxy"
    with (
        refusing(emulator, code) as store,
        used(store.url),
        pytest.raises(StorageError, match=message),
    ):
        USES[use]("gs://bucket/x")
    assert seconds / 2 <= clock[0] <= seconds * 1.25
    reports = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(reports) == (seconds > 0)


@pytest.mark.parametrize("use", USES)
def test_an_absent_bucket_is_one_message(use, emulator, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    with used(emulator), pytest.raises(OSError, match="gs://absent/x") as raised:
        USES[use]("gs://absent/x")
    assert "\n" not in str(raised.value)
    assert clock[0] == 0


def test_a_command_prints_one_message(emulator, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    flags = ["--source=gs://bucket/x", "--tokenizer=bytes", "--out=gs://bucket/y"]
    message = r"^error: [^\n]*gs://bucket/x\S* failed: 403[^\n]*$"
    with (
        refusing(emulator, 403) as store,
        used(store.url),
        pytest.raises(SystemExit, match=message),
    ):
        command.run(flags)


def test_answers_that_pass_lose_nothing(bucket, emulator, jsonl, tmp_path, clock, monkeypatch):
    """Two of five requests fail; set and windows are those of a store that never does."""
    local = prepare(str(jsonl), "bytes", tmp_path / "local", context=32)
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    with refusing(emulator, 429, 500, 502, 503, share=0.4) as store, used(store.url):
        made = prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
        found = windows(made, "train")
        objects = {name: file.read() for name, file in made.folder.walk()}
    assert sum(store.answered.values()) > 3
    assert objects == content(local.folder.local())
    for ours, theirs in zip(found, windows(local, "train"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_refusal_without_a_cache_is_one_message(bucket, emulator, jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    made = prepare(str(jsonl), "bytes", f"{bucket}/set", context=32)
    direct = dataclasses.replace(made, cache="off")
    message = rf"^The train split in {bucket}/set cannot be read: .*refused by the proxy"
    with (
        refusing(emulator, 403) as store,
        used(store.url),
        pytest.raises(ValueError, match=message),
    ):
        direct.windows("train")
