import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax.data import document
from flowhn_jax.data.document import Document
from flowhn_jax.storage import place

TEXT = st.text(st.sampled_from("ab \n€é𝄞"), max_size=80)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(document, "CHUNK_BYTES", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


def in_both(text, folder):
    """Return documents of the same text in memory and in a file."""
    path = folder / "text.txt"
    path.write_bytes(text)
    return Document("memory", text), Document("file", place(path))


@settings(deadline=None)
@given(text=TEXT)
def test_chunks(small_chunks_in_module, folder, text):
    raw = text.encode()
    memory, file = (list(d.chunks()) for d in in_both(raw, folder))
    assert memory == file
    assert b"".join(memory) == raw
    assert all(0 < len(chunk) <= 8 for chunk in memory)
    for chunk in memory[:-1]:
        chunk.decode()
        assert chunk.endswith(b"\n") or b"\n" not in chunk


@settings(deadline=None)
@given(text=TEXT, share=st.floats(0.01, 0.5))
def test_split(small_chunks_in_module, folder, text, share):
    raw = text.encode()
    for whole in in_both(raw, folder):
        if min(int(len(raw) * (1 - share)), len(raw) - 1) < len(text[:1].encode()):
            with pytest.raises(ValueError, match="must have enough text to hold out"):
                whole.split(share)
            continue
        first, second = (b"".join(part.chunks()) for part in whole.split(share))
        assert first + second == raw
        assert first.decode()
        assert second.decode()
        assert len(second) - len(raw) * share <= len(raw) / 10 + 4


@pytest.fixture(scope="module")
def small_chunks_in_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "CHUNK_BYTES", 8)
        yield


def test_a_document_is_split_after_a_line(tmp_path):
    text = b"line of text\n" * 1000
    for whole in in_both(text, tmp_path):
        first, second = (b"".join(part.chunks()) for part in whole.split(0.1))
        assert first.endswith(b"\n")
        assert len(second) == pytest.approx(len(text) / 10, abs=13)


def test_reading_a_file_reports_all_of_its_bytes(small_chunks, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"some text\nof lines\n")
    counts = []
    whole = Document("t", place(tmp_path / "t.txt"), counts.append)
    for part in whole.split(0.5):
        list(part.chunks())
    assert sum(counts) == 19


@pytest.mark.parametrize("bad", [b"ok\nok\nbad \xff\n", b"ok\n" * 7 + b"end \xe2\x82"])
def test_the_line_of_invalid_utf8_is_named(small_chunks, tmp_path, bad):
    line = bad.count(b"\n", 0, bad.find(b" ")) + 1
    for whole in in_both(bad, tmp_path):
        with pytest.raises(
            ValueError, match=rf"(memory|file), line {line}: the text must be UTF-8"
        ):
            list(whole.chunks())
