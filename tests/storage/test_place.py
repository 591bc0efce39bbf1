"""Both kinds of places do the same; local paths are never made of a bucket's name."""

import concurrent.futures
import contextlib
import hashlib
import pathlib

import pytest

from flowhn_jax import storage
from flowhn_jax.storage import requests
from flowhn_jax.storage.errors import is_storage_error


@pytest.fixture(params=["local", "bucket"])
def home(request, tmp_path):
    """Return an absent folder, in turn of each kind."""
    if request.param == "local":
        return storage.place(tmp_path / "home")
    return storage.place(request.getfixturevalue("bucket")) / "home"


def test_files_and_folders(home, rng):
    content = rng.bytes(300_000)
    file = home / "sub" / "file.bin"
    assert not any((home.exists(), home.is_dir(), file.is_file()))
    assert home.children() == list(home.walk()) == []
    file.parent.make_folder()
    file.write_whole(content)
    (home / "text").write_whole("row ä\n")
    assert home.is_dir()
    assert not home.is_file()
    assert file.is_file()
    assert not file.is_dir()
    assert file.exists()
    assert file.read() == content
    assert (home / "text").read_text() == "row ä\n"
    assert file.size() == len(content)
    assert home.children() == [home / "sub", home / "text"]
    assert list(home.walk()) == [("sub/file.bin", file), ("text", home / "text")]
    assert (file.name, file.parent, file.parent.parent) == ("file.bin", home / "sub", home)
    with file.open() as opened:
        opened.seek(1000)
        assert opened.read(50) == content[1000:1050]
    file.write_whole(b"other")
    assert file.read() == b"other"
    file.remove()
    file.remove()
    assert not file.exists()
    home.remove_tree()
    home.remove_tree()
    assert not home.exists()


def test_reading_what_is_absent(home):
    for read in (lambda p: p.read(), lambda p: p.size(), lambda p: p.open()):
        with pytest.raises(FileNotFoundError):
            read(home / "absent")


def test_local_copies(home, tmp_path):
    home.make_folder()
    with (home / "made").writing() as path:
        path.write_bytes(b"made")
        assert not (home / "made").exists()
    with (home / "made").fetched() as path:
        assert path.read_bytes() == b"made"
    (tmp_path / "source").write_bytes(b"source")
    (home / "copy").copy_from(tmp_path / "source")
    assert (home / "copy").read() == b"source"
    with contextlib.suppress(KeyError), (home / "made").writing() as path:
        path.write_bytes(b"half")
        raise KeyError
    assert (home / "made").read() == b"made"


def test_checksums_change_with_the_content(home, rng):
    content = rng.bytes(1000)
    (home / "a").make_folder()
    (home / "a" / "x").write_whole(content)
    (home / "b").write_whole(content)
    before = home.checksums()
    assert set(before) == {"a/x", "b"}
    assert before["a/x"] == before["b"]
    assert set(home.checksums("a/")) == {"a/x"}
    if home.checksum_kind == "sha256":
        assert before["b"] == hashlib.sha256(content).hexdigest()
    else:
        assert before["b"].startswith("1000:")
    (home / "b").write_whole(bytes([content[0] ^ 1]) + content[1:])
    assert home.checksums()["b"] != before["b"]


def test_writers_at_once_leave_one_whole_object(bucket):
    file = storage.place(bucket) / "file"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(file.write_whole, contents))
    assert file.read() in contents


def test_a_bucket_is_never_a_local_path(bucket):
    place = storage.place(bucket)
    assert str(place) == str(place.absolute()) == str(storage.place(place)) == bucket
    assert str(place.epath()) == bucket
    with pytest.raises(TypeError):
        pathlib.Path(place)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a local path is needed"):
        place.local()
    assert storage.is_remote(bucket)
    assert not storage.is_remote("runs/gs")


@pytest.mark.parametrize("path", ["s3://b/x", "hf://b", "file:///tmp/x", "az://x", "S3:/b/x"])
def test_other_schemes_are_refused(path):
    with pytest.raises(ValueError, match="Mount that storage"):
        storage.place(path)


@pytest.mark.parametrize("path", ["gs:/bucket/x", "gs://", "gs:///x", "gs://b/../c"])
def test_malformed_names_of_buckets(path, emulator):
    with pytest.raises(ValueError, match="must b"):
        storage.place(path)


def test_names_with_a_colon_are_local(tmp_path):
    for name in ("a:b", "hf:gpt2", "1:/x"):
        assert str(storage.place(name)) == name


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(requests, "PACKAGES", {"gcsfs_absent": "gcsfs", "google.x_y": "other"})
    with pytest.raises(ValueError, match="pip install gcsfs other"):
        storage.place("gs://bucket/x")


def test_errors_of_a_bucket_are_recognised(bucket):
    with pytest.raises(FileNotFoundError) as found:
        (storage.place(bucket) / "x").read()
    assert is_storage_error(found.value)
    assert not is_storage_error(ValueError("model.heads must be 4"))
