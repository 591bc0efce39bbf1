import gzip
import json
import os
import subprocess
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from read_back import ENVIRONMENT

from flowhn_jax.data import records
from flowhn_jax.data.sources import open_source


def texts(path, field="text", on_bytes_read=lambda count: None):
    """Return the texts of a source's documents."""
    documents = open_source(str(path), field).read(on_bytes_read)
    return [b"".join(document.chunks()).decode() for document in documents]


def as_jsonl(documents, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in documents).encode()


def write(path, documents, field="text"):
    """Write documents in the format that the name implies; return the path."""
    raw = as_jsonl(documents, field)
    if path.name.endswith(".txt"):
        path.write_text("\n".join(documents), newline="")
    elif path.name.endswith(".parquet"):
        table = pyarrow.table({field: documents, "n": range(len(documents))})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(raw))
    elif path.name.endswith(".zst"):  # two frames, as after `cat a.zst b.zst`
        half = len(raw) // 2
        path.write_bytes(zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]))
    else:
        path.write_bytes(raw)
    return path


RECORDS = ("s.jsonl", "s.jsonl.gz", "s.jsonl.zst", "s.parquet")


@pytest.mark.parametrize("name", [*RECORDS, "S.JSONL"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_records(tmp_path, paragraphs, name, field):
    path = write(tmp_path / name, [*paragraphs[:3], "", *paragraphs[3:]], field)
    assert texts(path, field) == paragraphs  # the empty document is left out


def test_a_text_file_is_one_document_byte_for_byte(tmp_path, paragraphs):
    text = "\r\n".join(paragraphs) + "\n\n"
    (tmp_path / "t.txt").write_bytes(text.encode())
    assert texts(tmp_path / "t.txt") == [text]


def test_long_lines_blank_lines_and_a_last_line_without_newline(tmp_path):
    long = "é" * 300_000
    raw = b"\n" + as_jsonl([long, "b"]) + b"  \n" + as_jsonl(["c"]).strip()
    (tmp_path / "s.jsonl").write_bytes(raw)
    (tmp_path / "s.jsonl.zst").write_bytes(zstandard.compress(raw))
    for name in ("s.jsonl", "s.jsonl.zst"):
        assert texts(tmp_path / name) == [long, "b", "c"]


PACK = {
    "t.txt": bytes,
    "s.jsonl": bytes,
    "s.jsonl.gz": gzip.compress,
    "s.jsonl.zst": zstandard.compress,
}


@pytest.mark.parametrize("name", PACK)
def test_byte_order_mark(tmp_path, name):
    raw = b"a\nb\n" if name == "t.txt" else as_jsonl(["a\nb\n"])
    for before in (b"", b"\xef\xbb\xbf"):
        (tmp_path / name).write_bytes(PACK[name](before + raw))
        counts = []
        assert texts(tmp_path / name, on_bytes_read=counts.append) == ["a\nb\n"]
        assert sum(counts) == (tmp_path / name).stat().st_size
    for nothing in (b"\xef\xbb\xbf", b"" if name == "t.txt" else b"\xef\xbb\xbf\n\n"):
        (tmp_path / name).write_bytes(PACK[name](nothing))
        assert texts(tmp_path / name) == []


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_is_recognized(tmp_path, name, codec):
    text = "\ufeff" + ("text é" if name == "t.txt" else '{"text": "é"}\n')
    (tmp_path / name).write_bytes(PACK[name](text.encode(codec)))
    with pytest.raises(
        ValueError, match=rf"{name}, line 1: the text must be UTF-8, .* UTF-16.*iconv"
    ):
        texts(tmp_path / name)


def test_splitting_after_a_byte_order_mark(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfabcd")
    (whole,) = open_source(str(tmp_path / "t.txt")).read(lambda count: None)
    parts = [b"".join(part.chunks()) for part in whole.split(0.5)]
    assert parts == [b"ab", b"cd"]


@pytest.mark.parametrize("name", RECORDS)
def test_a_document_above_the_limit_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "MAX_DOCUMENT_BYTES", 5000)
    fits = "é" * 2000
    path = write(tmp_path / name, ["a", fits, fits])
    raw = json.dumps({"text": fits}, ensure_ascii=False).encode()
    if "jsonl" in name:
        path.write_bytes(PACK[name](b"\n".join([raw, raw, raw])))
    assert texts(path)[-1] == fits
    write(path, ["a", "b" * 5001, "c"])
    with pytest.raises(ValueError, match=rf"{name}, (line|row) 2.*at most 5,000 bytes.*\.txt"):
        texts(path)


@pytest.mark.parametrize("name", RECORDS)
def test_memory_is_bounded_by_the_limit_on_a_document(tmp_path, name):
    """The source is a small compressed file with a line of 200 MB."""
    long = "b" * 200_000_000
    if name == "s.parquet":
        table = pyarrow.table({"text": [long]})
        pyarrow.parquet.write_table(table, tmp_path / name, compression="zstd")
    else:
        (tmp_path / name).write_bytes(PACK[name](as_jsonl([long])))
    del long
    code = """
import resource, sys
from flowhn_jax.data.sources import open_source
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    list(open_source(sys.argv[1]).read(lambda count: None))
except ValueError as error:
    assert "at most 67,108,864 bytes" in str(error), error
    print((peak() - before) // 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert int(done.stdout) < 300


def test_a_value_stored_once_for_many_rows_is_read_once(tmp_path):
    values = pyarrow.DictionaryArray.from_arrays([0] * 2000, ["b" * 1_000_000])
    path = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, store_schema=False)
    before = pyarrow.total_allocated_bytes()
    documents = open_source(str(path)).read(lambda count: None)
    assert len(next(documents).text) == 1_000_000
    assert pyarrow.total_allocated_bytes() - before < 20_000_000


def test_zstd_frames_of_every_kind(tmp_path):
    """Frames with and without checksum and size, concatenated, and a skippable one."""
    raw = as_jsonl([str(i) * (i % 3000) for i in range(1, 400)])
    random = np.random.default_rng(0).bytes(300_000).hex()
    raw += as_jsonl([random, "a" * 400_000])
    streaming = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    skipped = (0x184D2A53).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    frames = [
        zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress(raw),
        skipped,
        zstandard.ZstdCompressor(level=19).compress(raw),
        streaming.compress(raw) + streaming.flush(),
        zstandard.compress(b""),
    ]
    (tmp_path / "s.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "s.jsonl").write_bytes(raw * 3)
    assert texts(tmp_path / "s.jsonl.zst") == texts(tmp_path / "s.jsonl")


@pytest.mark.parametrize("name", RECORDS[1:])
def test_any_damage_is_one_message(tmp_path, paragraphs, name):
    """Files are truncated, or have bytes changed, at random places."""
    path = write(tmp_path / name, paragraphs)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(raw)
        if number % 3 == 0:
            del damaged[int(rng.integers(len(raw))) :]
        for _ in range(number % 3):
            damaged[int(rng.integers(len(raw)))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        found, message = None, ""
        try:
            found = texts(path)
        except ValueError as error:
            message = str(error)
        if found is None:
            assert message.startswith(str(path))
        elif name != "s.parquet":  # which has no checksums by default
            assert len(found) == (len(paragraphs) if damaged else 0)


def test_a_wrong_gzip_checksum_is_reported(tmp_path, paragraphs):
    path = write(tmp_path / "s.jsonl.gz", paragraphs)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    last = len(paragraphs)
    with pytest.raises(ValueError, match=rf"damaged or truncated after line {last}: CRC"):
        texts(path)


def test_the_row_of_invalid_utf8_in_parquet_is_named(tmp_path):
    values = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=r"s\.parquet, row 2, line 1: the text must be UTF-8"):
        texts(tmp_path / "s.parquet")


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.string_view(), "dictionary"])
def test_parquet_text_columns(tmp_path, paragraphs, kind):
    values = pyarrow.array(paragraphs)
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "s.parquet")
    assert texts(tmp_path / "s.parquet") == paragraphs


@pytest.mark.parametrize(
    ("values", "kind"),
    [([None], "NoneType"), ([b"a"], "bytes"), ([["a"]], "list"), ([{"a": 1}], "dict")],
)
def test_parquet_values_that_are_not_text(tmp_path, values, kind):
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "s.parquet")
    with pytest.raises(
        ValueError, match=rf"s\.parquet, row 1: the field 'text' must be a string; got type {kind}"
    ):
        texts(tmp_path / "s.parquet")


def test_a_folder_is_read_in_the_order_of_paths(tmp_path):
    for name, text in (("b.txt", "2"), ("a/z.txt", "1"), ("c.txt", "3"), ("empty.txt", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path / "d.jsonl", ["4", "5"])
    (tmp_path / "notes.md").write_text("other")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    assert texts(tmp_path) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", [*RECORDS[:3], "t.txt"])
def test_progress_counts_the_bytes_of_the_files(tmp_path, paragraphs, name):
    path = write(tmp_path / name, paragraphs)
    counts = []
    texts(path, on_bytes_read=counts.append)
    assert sum(counts) == open_source(str(path)).size == path.stat().st_size


def test_the_identity_depends_on_names_sizes_and_times(tmp_path):
    path = write(tmp_path / "s.jsonl", ["a", "b"])
    known = open_source(str(tmp_path)).identity
    assert open_source(str(tmp_path)).identity == known
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source(str(tmp_path)).identity != known
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_source(str(tmp_path)).identity == known
    path.rename(tmp_path / "r.jsonl")
    assert open_source(str(tmp_path)).identity != known


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "trunc', "line 3 is not JSON"),
        (b'{"body": "x"}', r"line 3: there is no field 'text' \(found: body\); type --text"),
        (b"{}", r"line 3: there is no field 'text' \(found: none\)"),
        (b'["x"]', "line 3: the record must be an object .*; got a JSON list"),
        (b'{"text": 7}', "line 3: the field 'text' must be a string; got type int"),
        (b'{"text": null}', "line 3: the field 'text' must be a string; got type NoneType"),
        (b'{"text": "\xff"}', "line 3: the text must be UTF-8"),
        (rb'{"text": "\ud800"}', "line 3: the field 'text' must be valid Unicode"),
        (b"[" * 100_000, "line 3 is not JSON: it is nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", RECORDS[:3])
def test_malformed_lines_are_named(tmp_path, line, message, name):
    raw = as_jsonl(["a", "b"]) + line + b"\n" + as_jsonl(["c"])
    pack = {"s.jsonl": bytes, "s.jsonl.gz": gzip.compress, "s.jsonl.zst": zstandard.compress}
    (tmp_path / name).write_bytes(pack[name](raw))
    with pytest.raises(ValueError, match=f"{name}, {message}"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", RECORDS[1:])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"not " + raw])
def test_damaged_files_are_named(tmp_path, paragraphs, name, damage):
    path = write(tmp_path / name, paragraphs)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        texts(path)


def test_parquet_columns(tmp_path):
    path = write(tmp_path / "s.parquet", ["a", "b"], "content")
    with pytest.raises(
        ValueError, match=r"s\.parquet: there is no column 'text' \(found: content, n\)"
    ):
        texts(path)
    with pytest.raises(
        ValueError, match=r"s\.parquet, row 1: the field 'n' must be a string; got type int"
    ):
        texts(path, "n")


def test_pipes_and_dangling_links_are_skipped(tmp_path):
    write(tmp_path / "a.jsonl", ["a"])
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    assert texts(tmp_path) == ["a"]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(
        ValueError, match=r"must hold a file of the kinds \.txt, \.jsonl.*\.parquet"
    ):
        open_source(str(tmp_path))
    (tmp_path / "s.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"s\.csv must be a file of the kinds \.txt, \.jsonl"):
        open_source(str(tmp_path / "s.csv"))


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("s.jsonl.zst", "zstandard", "zstandard"),
        ("s.parquet", "pyarrow", "pyarrow"),
        ("hf:some/name", "datasets", "datasets"),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, name, module, package):
    source = name if name.startswith("hf:") else write(tmp_path / name, ["a", "b"])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        texts(source)


def test_hugging_face_dataset(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a", "n": 1}, {"text": ""}, {"text": "bé"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    counts = []
    assert texts("hf:some/name:config", on_bytes_read=counts.append) == ["a", "bé"]
    assert texts("hf:some/name") == ["a", "bé"]
    assert calls == [("some/name", "config", "train", True), ("some/name", None, "train", True)]
    assert sum(counts) == 4
    assert open_source("hf:some/name").size is None
    with pytest.raises(
        ValueError, match=r"hf:some/name, row 1: there is no field 'body' \(found: text, n\)"
    ):
        texts("hf:some/name", "body")

    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(ValueError, match="hf:some/name: no network"):
        texts("hf:some/name")


def test_hugging_face_dataset_in_a_folder(tmp_path, paragraphs):
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", paragraphs)
    known = open_source(f"hf:{tmp_path}").identity
    assert texts(f"hf:{tmp_path}") == paragraphs
    write(tmp_path / "train.jsonl", paragraphs[1:])
    assert open_source(f"hf:{tmp_path}").identity != known
