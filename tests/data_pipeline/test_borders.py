import numpy as np
import pytest
from library_tokenizers import KINDS, save

from flowhn_jax.data import document
from flowhn_jax.data.borders import encode_after, split
from flowhn_jax.data.document import Document
from flowhn_jax.data.tokenizer import load_tokenizer

WORDS = ["the", "cat", "sat", "on", "mat", "and", "a", "dog", "to", "</s>", "é", "海の巨人"]


def words(separators, count=9000):
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(WORDS), size=count), rng.integers(len(separators), size=count)
    return "".join(WORDS[i] + separators[j] for i, j in zip(*chosen, strict=True))


TEXTS = {
    "spaces": words([" "]),
    "lines": words(["\n"]),
    "mixed": words([" ", " ", "\n", "\n\n", "\r\n", ", ", ""]),
    "no_space": words([""]),
    "end_of_text": "</s> " * 9000,
    "combining": "e\u0301 a\u0308" * 9000,
}


def encode_in_pieces(tokenizer, text):
    pieces = list(split(tokenizer, Document("text", text.encode())))
    assert b"".join(piece for _, piece in pieces).decode() == text
    assert len(pieces) > 2
    return np.concatenate([encode_after(tokenizer, *piece) for piece in pieces])


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch, kind, text):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(save(tmp_path, kind)))
    monkeypatch.setattr(document, "PIECE_BYTES", 7001)
    whole = tokenizer.encode(TEXTS[text])
    assert np.array_equal(encode_in_pieces(tokenizer, TEXTS[text]), whole)


@pytest.mark.parametrize("kind", ["unigram", "bpe_bytes", "wordpiece"])
def test_pieces_of_a_mebibyte(tmp_path, kind):
    tokenizer = load_tokenizer(str(save(tmp_path, kind)))
    text = TEXTS["mixed"] * 50
    assert len(text.encode()) > 2 * document.PIECE_BYTES
    assert np.array_equal(encode_in_pieces(tokenizer, text), tokenizer.encode(text))


def test_pieces_are_bounded_where_no_border_is_good(tmp_path, monkeypatch):
    class Whole:
        """Its tokens depend on all of a text."""

        def encode(self, text):
            return np.array([len(text)])

    monkeypatch.setattr(document, "PIECE_BYTES", 10_000)
    text = b"word " * 20_000
    pieces = list(split(Whole(), Document("text", text)))
    assert b"".join(piece for _, piece in pieces) == text
    assert max(len(piece) for _, piece in pieces) <= 15_000
    assert [encode_after(Whole(), *piece).tolist() for piece in pieces[1:3]] == [[10_000], [10_000]]
