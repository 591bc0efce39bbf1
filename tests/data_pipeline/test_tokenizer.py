import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.data.tokenizer import load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode(text.encode()), ids)


def test_bytes_decode_drops_what_is_no_byte_and_replaces_what_is_no_text():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (256, 257)
    assert tokenizer.decode([256, 104, 105, 256, 300, -1]) == "hi"
    assert tokenizer.decode([0xC3, 104]) == "�h"


@given(TEXT)
def test_file_round_trip(tokenizer_json, text):
    tokenizer = load_tokenizer(str(tokenizer_json))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert (ids >= 0).all()
    assert (ids < tokenizer.vocab_size).all()
    assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == text


def test_file_compresses_and_agrees_with_the_library(tokenizer_json, paragraphs):
    import tokenizers

    tokenizer = load_tokenizer(str(tokenizer_json))
    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    for text in paragraphs:
        ids = tokenizer.encode(text).tolist()
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert len(ids) < len(text.encode())


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_in_a_document_are_plain_text(tokenizer_json, tmp_path, special):
    content = json.loads(tokenizer_json.read_text())
    for token in content["added_tokens"]:
        token["special"] = special
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content))
    loaded = load_tokenizer(str(path))
    for tokenizer in (loaded, pickle.loads(pickle.dumps(loaded))):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_truncation_and_padding_of_the_file_are_off(tokenizer_json, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "t.json"))
    text = "a text of more than four tokens"
    expected = load_tokenizer(str(tokenizer_json)).encode(text)
    assert np.array_equal(load_tokenizer(str(tmp_path / "t.json")).encode(text), expected)


def test_end_of_text_and_fingerprint(tokenizer_json):
    usual = load_tokenizer(str(tokenizer_json))
    other = load_tokenizer(str(tokenizer_json), eot_token="<|pad|>")
    assert usual.eot_token == "<|endoftext|>"
    assert usual.eot_id != other.eot_id
    assert usual.fingerprint != other.fingerprint
    assert usual.fingerprint == load_tokenizer(str(tokenizer_json)).fingerprint


def test_no_end_of_text(tokenizer_json, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(tokenizer_json.read_text().replace("<|endoftext|>", "<|finis|>"))
    with pytest.raises(ValueError, match=r"end-of-text.*eot_token.*<\|finis\|>"):
        load_tokenizer(str(path))
    assert load_tokenizer(str(path), eot_token="<|finis|>").eot_token == "<|finis|>"
    with pytest.raises(ValueError, match="no token 'x y'"):
        load_tokenizer(str(path), eot_token="x y")


def test_ids_beyond_int32(tokenizer_json, tmp_path):
    path = tmp_path / "t.json"
    content = json.loads(tokenizer_json.read_text())
    content["model"]["vocab"][max(content["model"]["vocab"])] = 2**31
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t\.json has id 2147483648; the most is 2147483646"):
        load_tokenizer(str(path))


def test_bad_specs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json.*bytes, FILE\.json.*hf:NAME"):
        load_tokenizer(str(tmp_path / "absent.json"))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json is not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"t\.json is not a text file"):
        load_tokenizer(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match="bytes has its own"):
        load_tokenizer("bytes", eot_token="</s>")


def test_missing_packages_are_named(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(str(tokenizer_json))
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_tokenizer("hf:some/name")


def test_hub_repository(tokenizer_json, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tokenizer_json)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tokenizer = load_tokenizer("hf:some/name")
    assert asked == [("some/name", "tokenizer.json")]
    assert tokenizer.spec == "hf:some/name"
    assert tokenizer.fingerprint == load_tokenizer(str(tokenizer_json)).fingerprint

    def fail(name, file):
        raise RuntimeError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"hf:some/name.*no network"):
        load_tokenizer("hf:some/name")
