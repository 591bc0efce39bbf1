"""What counts as a complete, undamaged checkpoint, on folders of a few bytes."""

import hashlib
import json
import os
import shutil

import pytest
import tensorstore

from flowhn_jax.checkpoints import manifest

METADATA = {
    "commit_timestamp_nsecs": 1,
    "item_handlers": {"params": "p", "optimizer": "o", "data": "d"},
}


def store(path):
    """Write a TensorStore key-value store as Orbax does: a large value, then a small one."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    opened = tensorstore.KvStore.open(spec).result()
    for key, size in ((b"a", 999), (b"b", 200)):
        opened.write(key, b"v" * size).result()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "8"
    for name in ("params", "optimizer"):
        store(folder / name)
    (folder / "data").mkdir()
    (folder / "data" / "batches.json").write_text("{}")
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(METADATA))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """Return a committed checkpoint without hashes."""
    return shutil.copytree(original, tmp_path / "8")


def truncate(folder, group):
    """Cut off all files of a group of arrays."""
    for path in (folder / group).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-9])


def test_hashes_are_those_of_all_files(folder):
    expected = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert not manifest.is_written(folder)
    manifest.write(folder)
    assert manifest.is_written(folder)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert hashes == expected
    assert list(hashes) == sorted(hashes)
    assert "data/batches.json" in hashes
    assert manifest.damage(folder) is None


@pytest.mark.parametrize("parts", ["", "data/", ("params/", "data/")])
def test_a_changed_or_missing_file_is_named(folder, parts):
    manifest.write(folder)
    (folder / "data" / "batches.json").write_text("[]")
    found = manifest.damage(folder, parts)
    assert found == "data/batches.json has changed since it was written"
    (folder / "data" / "batches.json").unlink()
    assert manifest.damage(folder, parts) == "data/batches.json is missing"
    (folder / "data" / "batches.json").mkdir()
    assert manifest.damage(folder, parts) == "data/batches.json is missing"
    assert manifest.damage(folder, ("params/", "optimizer/")) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"sha256": ["a"]}', b'{"sha256": 3}'])
def test_hashes_that_cannot_be_read(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert manifest.damage(folder) == "manifest.json cannot be read"


def test_names_that_are_not_files_or_folders(folder):
    assert manifest.damage(folder / "_CHECKPOINT_METADATA") == "it is not a folder"
    assert manifest.damage(folder / "nothing") == "it is not a folder"
    os.mkfifo(folder / "data" / "pipe")
    assert manifest.damage(folder) == "data/pipe is not a file"
    (folder / "data" / "pipe").unlink()
    (folder / "manifest.json").mkdir()
    assert manifest.damage(folder) == "manifest.json is not a file"


def test_without_hashes_the_requested_arrays_must_be_readable(folder):
    assert manifest.damage(folder) is None
    truncate(folder, "optimizer")
    assert manifest.damage(folder).startswith("optimizer cannot be read: ")
    assert manifest.damage(folder, ("params/", "data/")) is None
    assert manifest.damage(folder, "optimizer/").startswith("optimizer cannot be read: ")
    truncate(folder, "params")
    assert manifest.damage(folder).startswith("params cannot be read: ")
    assert manifest.damage(folder, "data/") is None


def test_arrays_without_hashes_are_read_not_only_listed(folder):
    """The list of keys is in the newer file, the large value alone in the older."""
    files = (folder / "params" / "d").iterdir()
    larger = max(files, key=lambda file: file.stat().st_size)
    larger.write_bytes(larger.read_bytes()[:500])
    assert manifest.damage(folder).startswith("params cannot be read: ")


def test_an_import_has_no_optimizer(folder):
    assert not manifest.is_import(folder)
    shutil.rmtree(folder / "optimizer")
    metadata = METADATA | {"item_handlers": {"params": "p"}}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    assert manifest.is_import(folder)
    assert manifest.damage(folder) is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"commit_timestamp_nsecs": None}, "does not record that the checkpoint was completed"),
        (
            {"item_handlers": {"optimizer": "o"}},
            "does not record that the checkpoint was completed",
        ),
        ({"item_handlers": None}, "cannot be read"),
    ],
)
def test_metadata_without_a_commit(folder, changed, reason):
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(METADATA | changed))
    assert manifest.damage(folder) == f"_CHECKPOINT_METADATA {reason}"


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[]"])
def test_metadata_that_cannot_be_read(folder, content):
    (folder / "_CHECKPOINT_METADATA").write_bytes(content)
    assert manifest.damage(folder) == "_CHECKPOINT_METADATA cannot be read"


def test_parts_that_are_missing_are_named(folder):
    (folder / "data").rename(folder.parent / "data")
    assert manifest.damage(folder) == "data is missing"
    (folder / "params").rename(folder.parent / "params")
    assert manifest.damage(folder, "data/") == "params, data is missing"
    (folder / "_CHECKPOINT_METADATA").unlink()
    expected = "_CHECKPOINT_METADATA is missing, so the checkpoint was never completed"
    assert manifest.damage(folder) == expected


def test_with_hashes_the_content_of_metadata_does_not_matter(folder):
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({}))
    manifest.write(folder)
    assert manifest.damage(folder) is None


def test_a_part_without_content_is_missing(folder):
    (folder / "data" / "batches.json").unlink()
    (folder / "data" / "commit_success.txt").touch()
    assert manifest.damage(folder) == "data is missing"


@pytest.mark.parametrize("listed", [(), ("_CHECKPOINT_METADATA",), ("params/a",)])
def test_hashes_of_no_checkpoint_count_as_damage(folder, listed):
    (folder / "params" / "a").touch()
    manifest.write(folder)
    path = folder / "manifest.json"
    hashes = json.loads(path.read_text())["sha256"]
    path.write_text(json.dumps({"sha256": {name: hashes[name] for name in listed}}))
    assert manifest.damage(folder) == "manifest.json does not list the files of a checkpoint"
