import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowhn_jax.data import document
from flowhn_jax.data.document import Document

TEXT = st.text(st.sampled_from("ab \n€é𝄞"), max_size=80)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(document, "PIECE_BYTES", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("documents")


def in_both(text, folder):
    """The same text in memory and in a file."""
    path = folder / "text.txt"
    path.write_bytes(text)
    return Document("memory", text), Document("file", path)


@settings(deadline=None)
@given(text=TEXT)
def test_pieces(small_pieces_once, folder, text):
    raw = text.encode()
    memory, file = (list(d.pieces()) for d in in_both(raw, folder))
    assert memory == file
    assert b"".join(memory) == raw
    assert all(0 < len(piece) <= 8 for piece in memory)
    for piece in memory[:-1]:
        piece.decode()
        assert piece.endswith(b"\n") or b"\n" not in piece


@settings(deadline=None)
@given(text=TEXT, share=st.floats(0.01, 0.5))
def test_halves(small_pieces_once, folder, text, share):
    raw = text.encode()
    for whole in in_both(raw, folder):
        if min(int(len(raw) * (1 - share)), len(raw) - 1) < len(text[:1].encode()):
            with pytest.raises(ValueError, match="too little text"):
                whole.halves(share)
            continue
        first, second = (b"".join(half.pieces()) for half in whole.halves(share))
        assert first + second == raw
        assert first.decode()
        assert second.decode()
        assert len(second) - len(raw) * share <= len(raw) / 10 + 4


@pytest.fixture(scope="module")
def small_pieces_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "PIECE_BYTES", 8)
        yield


def test_halves_cut_behind_a_line(tmp_path):
    text = b"line of text\n" * 1000
    for whole in in_both(text, tmp_path):
        first, second = (b"".join(half.pieces()) for half in whole.halves(0.1))
        assert first.endswith(b"\n")
        assert len(second) == pytest.approx(len(text) / 10, abs=13)


def test_reading_a_file_advances_by_its_bytes(small_pieces, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"some text\nof lines\n")
    counts = []
    whole = Document("t", tmp_path / "t.txt", counts.append)
    for half in whole.halves(0.5):
        list(half.pieces())
    assert sum(counts) == 19


@pytest.mark.parametrize("bad", [b"ok\nok\nbad \xff\n", b"ok\n" * 7 + b"cut \xe2\x82"])
def test_bad_utf8_names_the_line(small_pieces, tmp_path, bad):
    line = bad.count(b"\n", 0, bad.find(b" ")) + 1
    for whole in in_both(bad, tmp_path):
        with pytest.raises(ValueError, match=rf"(memory|file), line {line}: not UTF-8"):
            list(whole.pieces())
