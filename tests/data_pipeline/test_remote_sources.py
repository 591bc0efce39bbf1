"""Sources in a bucket are read as local ones are."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flowhn_jax.data.sources import open_source
from flowhn_jax.storage import place


@pytest.fixture
def folder(tmp_path, paragraphs):
    """Return a local folder with a file of each kind, and files that no source has."""
    root = tmp_path / "texts"
    (root / "b" / "c").mkdir(parents=True)
    raw = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs).encode()
    (root / "z.txt").write_text("\ufeff" + "\n".join(paragraphs))
    (root / "b" / "a.jsonl").write_bytes(raw)
    (root / "b" / "c" / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (root / "b.jsonl.zst").write_bytes(zstandard.compress(raw))
    table = pyarrow.table({"text": paragraphs, "n": range(len(paragraphs))})
    pyarrow.parquet.write_table(table, root / "b" / "rows.parquet", row_group_size=3)
    (root / "notes.md").write_text("not a source")
    (root / ".hidden.txt").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "a.txt").write_text("hidden")
    return root


@pytest.fixture
def uploaded(bucket, folder):
    """Return the same folder in a bucket."""
    remote = place(bucket) / "texts"
    for name, file in place(folder).walk():
        (remote / name).copy_from(file.local())
    return remote


def read(path):
    """Return the names below `path`, the texts, and the bytes read of a source's documents."""
    source, counts = open_source(str(path)), []
    found = [
        (document.name.removeprefix(str(path)), b"".join(document.chunks()))
        for document in source.read(counts.append)
    ]
    source.check_unchanged()
    return found, sum(counts), source.size


def test_a_folder(folder, uploaded):
    found, count, size = read(uploaded)
    texts, local_count, local_size = read(folder)
    assert found == texts
    assert len(found) > 100
    assert size == local_size
    assert count == pytest.approx(local_count, rel=0.1)  # parquet's footer is read more than once
    assert open_source(str(uploaded)).identity == open_source(str(uploaded)).identity


@pytest.mark.parametrize("name", ["z.txt", "b/a.jsonl", "b/c/a.jsonl.gz", "b.jsonl.zst"])
def test_a_file(folder, uploaded, name):
    assert read(uploaded / name) == read(folder / name)


def test_a_long_text_is_read_from_any_position(bucket, tmp_path, rng):
    text = "\n".join(map(str, rng.integers(0, 10**9, 400_000).tolist()))
    (tmp_path / "t.txt").write_text(text)
    (place(bucket) / "t.txt").copy_from(tmp_path / "t.txt")
    parts = []
    for path in (f"{bucket}/t.txt", str(tmp_path / "t.txt")):
        (whole,) = open_source(path).read(lambda count: None)
        parts.append([b"".join(part.chunks()) for part in whole.split(0.3)])
    assert parts[0] == parts[1]
    assert b"".join(parts[0]).decode() == text


@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_a_source_that_changes_is_refused(uploaded, change):
    source = open_source(str(uploaded))
    if change == "replaced":
        (uploaded / "b" / "a.jsonl").write_whole('{"text": "other"}\n')
    elif change == "added":
        (uploaded / "b" / "a2.txt").write_whole("more")
    else:
        (uploaded / "b" / "a.jsonl").remove()
    with pytest.raises(ValueError, match=rf"^{uploaded}/b/a2?\..* must not change while it is"):
        source.check_unchanged()
    assert open_source(str(uploaded)).identity != source.identity


def test_what_cannot_be_a_source(bucket, uploaded):
    with pytest.raises(FileNotFoundError, match=rf"^Source {bucket}/nowhere does not exist\.$"):
        open_source(f"{bucket}/nowhere")
    with pytest.raises(ValueError, match=r"notes\.md must be a file of the kinds"):
        open_source(f"{uploaded}/notes.md")
    (place(bucket) / "empty" / "notes.md").write_whole("x")
    with pytest.raises(ValueError, match="empty must hold a file of the kinds"):
        open_source(f"{bucket}/empty")
    with pytest.raises(ValueError, match="paths must be local or begin with gs://; got 's3://b/t'"):
        open_source("s3://b/t")


def test_damage_is_one_message(uploaded):
    damaged = uploaded / "b" / "c" / "a.jsonl.gz"
    damaged.write_whole(damaged.read()[:-9])
    with pytest.raises(ValueError, match=rf"^{damaged}: damaged or truncated after line"):
        read(uploaded)
