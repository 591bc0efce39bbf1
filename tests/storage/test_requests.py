"""Requests that are refused for a while are repeated; the others give one message."""

import pytest

from flowhn_jax import storage
from flowhn_jax.storage import requests
from flowhn_jax.storage.errors import StorageError, is_storage_error
from tests.storage.emulator import used
from tools.faults import FaultyStore


@pytest.fixture
def store(emulator, bucket):
    with FaultyStore(emulator) as store, used(store.url):
        yield store


@pytest.mark.parametrize("code", [403, 429, 503])
def test_a_refusal_that_passes_is_reported_once(store, bucket, code, monkeypatch, capfd):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            store.serve()

    monkeypatch.setattr(requests, "sleep", sleep)
    file = storage.place(bucket) / "file"
    file.write_whole(b"before")
    store.refuse(code)
    file.write_whole(b"content")
    assert file.read() == b"content"
    assert store.answered[code] == 3
    assert 0.3 < pauses[0] < pauses[1] < pauses[2] < 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "gs://" in line]
    assert line.startswith(f"writing {file}: {code} ")
    assert "trying again for up to" in line


@pytest.mark.parametrize("code", [403, 429, 503])
def test_a_refusal_that_stays_is_one_message(store, bucket, code, monkeypatch):
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(requests.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(requests, "sleep", lambda seconds: None)
    store.refuse(code)
    for request in (
        lambda place: place.write_whole(b"x"),
        lambda place: place.read(),
        lambda place: place.children(),
        lambda place: place.is_file(),
    ):
        with pytest.raises(StorageError, match=rf"failed: {code} .*refused by the proxy") as found:
            request(storage.place(bucket) / "file")
        assert is_storage_error(found.value)


def test_a_refusal_that_cannot_pass_is_not_repeated(store, bucket):
    store.refuse(413)
    with pytest.raises(StorageError, match="413"):
        storage.place(bucket).children()
    assert store.answered[413] == 1


def test_a_store_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setattr(requests, "sleep", lambda seconds: None)
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(requests.time, "monotonic", lambda: float(next(clock)))
    with used("http://127.0.0.1:9"), pytest.raises(StorageError, match="listing gs://"):
        storage.place(bucket).children()


def test_half_of_all_requests_fail_and_nothing_is_lost(store, bucket, monkeypatch, rng):
    monkeypatch.setattr(requests, "sleep", lambda seconds: None)
    store.refuse(403, 429, 503, share=0.5)
    contents = {f"{i:02d}": rng.bytes(1000) for i in range(20)}
    for name, content in contents.items():
        (storage.place(bucket) / name).write_whole(content)
    assert {name: place.read() for name, place in storage.place(bucket).walk()} == contents


def test_the_client_sends_no_requests_of_its_own(store, bucket):
    store.refuse(413)
    for count in range(1, 4):
        with pytest.raises(StorageError, match="413"):
            storage.place(bucket).children()
        assert store.answered[413] == count
