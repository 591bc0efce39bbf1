import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation.text_stream import TextStream

BYTES = load_tokenizer("bytes")


def run(ids, stop=()):
    """Return the pieces of all ids up to a stop string, and the stream."""
    stream = TextStream(BYTES, stop)
    pieces = []
    for each in ids:
        pieces.append(stream.push(each))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(st.text(max_size=20))
def test_pieces_join_to_the_text_without_broken_characters(text):
    pieces, stream = run(text.encode())
    assert "".join(pieces) == stream.text == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_first_stop_string(text, stop):
    pieces, stream = run(text.encode(), stop)
    # The stop string that is complete first ends the text, wherever it starts.
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))] if stop else []
    if ends:
        head = text[: ends[0]]
        expected = head[: min(head.find(each) for each in stop if each in head)]
        assert stream.stopped
    else:
        expected = text
        assert not stream.stopped
    assert "".join(pieces) == stream.text == expected


def test_a_partial_stop_string_is_held_back():
    stream = TextStream(BYTES, ["END"])
    assert [stream.push(each) for each in b"aENx"] == ["a", "", "", "ENx"]


def test_undecodable_bytes_are_shown_eventually():
    pieces, stream = run([0xFF] * 100)
    assert stream.text == "\ufffd" * 100
    assert "".join(pieces[:-1])


def test_a_space_at_the_start_of_the_first_token_is_kept(tmp_path):
    """SentencePiece decoders strip it at the beginning of a text."""
    vocabulary = {"<eos>": 0, "▁": 1, "a": 2, "▁a": 3}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("▁", "a")]))
    bpe.decoder = tokenizers.decoders.Metaspace()
    bpe.save(str(tmp_path / "t.json"))
    stream = TextStream(load_tokenizer(str(tmp_path / "t.json")), before=[0, 3])
    assert [stream.push(3), stream.push(2), stream.finish()] == [" a", "a", ""]


@pytest.mark.parametrize("text", ["é", "€", "🙂"])
def test_a_character_of_several_bytes_is_returned_whole(text):
    stream = TextStream(BYTES)
    pieces = [stream.push(each) for each in text.encode()]
    assert pieces == [""] * (len(pieces) - 1) + [text]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 8, 9, 40, 63, 64, 65, 66, 67, 100])
@pytest.mark.parametrize("text", ["😀 ok", "日本", "é", "a"])
def test_a_character_after_any_number_of_undecodable_bytes_is_whole(count, text):
    pieces, _ = run([0x80] * count + list(text.encode()))
    assert "".join(pieces) == "\ufffd" * count + text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_pieces_join_to_the_decoded_ids(ids):
    pieces, _ = run(ids)
    assert "".join(pieces) == BYTES.decode(ids)


def test_a_byte_that_undoes_an_earlier_character_adds_one_replacement(tmp_path):
    """A decoder of byte tokens decodes a run of them whole or not at all."""
    vocabulary = {"<eos>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    bpe.save(str(tmp_path / "t.json"))
    stream = TextStream(load_tokenizer(str(tmp_path / "t.json")))
    ids = [2 + byte for byte in (*"海".encode(), 0xFF)] + [1]
    assert "".join([*map(stream.push, ids), stream.finish()]) == "海\ufffda"
