import numpy as np
import pytest
from library_tokenizers import KINDS, save

from flowhn_jax.data import document
from flowhn_jax.data.chunking import encode_chunk, split_into_chunks
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


def encode_in_chunks(tokenizer, text):
    chunks = list(split_into_chunks(tokenizer, Document("text", text.encode())))
    assert b"".join(chunk for _, chunk in chunks).decode() == text
    assert len(chunks) > 2
    return np.concatenate([encode_chunk(tokenizer, *chunk) for chunk in chunks])


@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_chunks_have_the_tokens_of_the_whole_text(tmp_path, monkeypatch, kind, text):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(save(tmp_path, kind)))
    monkeypatch.setattr(document, "CHUNK_BYTES", 7001)
    whole = tokenizer.encode(TEXTS[text])
    assert np.array_equal(encode_in_chunks(tokenizer, TEXTS[text]), whole)


@pytest.mark.parametrize("kind", ["unigram", "bpe_bytes", "wordpiece"])
def test_chunks_of_the_default_size(tmp_path, kind):
    tokenizer = load_tokenizer(str(save(tmp_path, kind)))
    text = TEXTS["mixed"] * 50
    assert len(text.encode()) > 2 * document.CHUNK_BYTES
    assert np.array_equal(encode_in_chunks(tokenizer, text), tokenizer.encode(text))


def test_chunks_are_bounded_even_if_no_boundary_is_independent_of_the_text_after_it(
    tmp_path, monkeypatch
):
    class WholeTextTokenizer:
        """A tokenizer whose tokens depend on the whole text."""

        def encode(self, text):
            return np.array([len(text)])

    monkeypatch.setattr(document, "CHUNK_BYTES", 10_000)
    text = b"word " * 20_000
    chunks = list(split_into_chunks(WholeTextTokenizer(), Document("text", text)))
    assert b"".join(chunk for _, chunk in chunks) == text
    assert max(len(chunk) for _, chunk in chunks) <= 15_000
    assert [encode_chunk(WholeTextTokenizer(), *chunk).tolist() for chunk in chunks[1:3]] == [
        [10_000],
        [10_000],
    ]
