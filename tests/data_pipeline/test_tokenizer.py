import json
import os
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from library_tokenizers import BACKTRACKING, KINDS, LOSSLESS, save

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


def test_decoding_bytes_drops_other_ids_and_replaces_invalid_utf8():
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


def test_ids_are_fewer_than_bytes_and_those_of_the_library(tokenizer_json, paragraphs):
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("listed", ["special", "ordinary", "absent"])
def test_no_text_is_encoded_as_end_of_text(tmp_path, kind, listed):
    """This holds whether or not the file lists end-of-text as an added token."""
    path = save(tmp_path, kind, listed)
    tokenizer = load_tokenizer(str(path))
    eot = tokenizer.eot_token
    for text in (eot, f"the cat {eot} the dog", f"the cat{eot}the dog", f"  {eot}  ", eot * 3):
        for loaded in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
            ids = loaded.encode(text)
            assert tokenizer.eot_id not in ids
            if kind in LOSSLESS:
                assert loaded.decode(ids).strip() == text.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_keeps_its_ids(tmp_path, kind):
    import tokenizers

    path = save(tmp_path, kind, "special")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_tokens(["dog and", "zz"])  # numbered after the vocabulary
    library.add_special_tokens(["<|last|>"])
    library.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocab_size == library.get_vocab_size()
    text = "the cat sat zz on the mat, a dog and a cat"
    assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids
    last = library.token_to_id("<|last|>")
    assert tokenizer.decode([tokenizer.eot_id, last, tokenizer.eot_id]) == "<|last|>"


@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}, {"normalized": True}])
@pytest.mark.parametrize("kind", ["bpe_metaspace", "bpe_bytes"])
def test_end_of_text_within_another_added_token(tmp_path, kind, flags):
    import tokenizers

    path = save(tmp_path, kind, "special")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_tokens([tokenizers.AddedToken("x</s>y", **flags)])
    library.save(str(path))
    tokenizer = load_tokenizer(str(path), eot_token="</s>")
    for text in ("ax</s>yb", "ax</s>b", "a</s>yb"):
        assert tokenizer.eot_id not in tokenizer.encode(text)
        if kind == "bpe_bytes":  # Metaspace puts a space after an added token
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_with_the_id_of_end_of_text_is_unknown(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1, "</s>": 2, "b": 2}}
    (tmp_path / "t.json").write_text(json.dumps({"model": model | {"unk_token": "<unk>"}}))
    assert load_tokenizer(str(tmp_path / "t.json")).encode("b").tolist() == [1]


@pytest.mark.parametrize("model", ["WordLevel", "WordPiece", "BPE", "Unigram"])
def test_unknown_text_with_the_id_of_end_of_text_is_dropped(tmp_path, model):
    import tokenizers

    vocabulary = {"</s>": 0, "a": 1}
    if model == "Unigram":
        library = tokenizers.Tokenizer(tokenizers.models.Unigram([("</s>", 0.0), ("a", -1.0)], 0))
    elif model == "BPE":
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="</s>"))
    else:
        kind = getattr(tokenizers.models, model)
        library = tokenizers.Tokenizer(kind(vocabulary, unk_token="</s>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).encode("a ? a </s>").tolist() == [1, 1]


def test_a_merge_that_produces_end_of_text_is_not_applied(tmp_path):
    """Trainers keep the id of a special token that a merge happens to produce."""
    import tokenizers

    vocabulary = {"</s>": 0, "<": 1, "/": 2, "s": 3, ">": 4, "</": 5, "s>": 6, "x": 7, "</s>x": 8}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "x")]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.encode("</s>x</s>").tolist() == [5, 6, 7, 5, 6]


def test_end_of_text_of_one_character_is_refused(tokenizer_json):
    with pytest.raises(ValueError, match=r"must not be a single character, .*; got 'a'"):
        load_tokenizer(str(tokenizer_json), eot_token="a")


def test_an_error_of_the_library_is_one_message(tmp_path, capfd):
    path = save(tmp_path, "backtracking")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("a b").tolist()
    with pytest.raises(ValueError, match=r"t\.json cannot encode a text: Onig: .*retry-limit"):
        tokenizer.encode(BACKTRACKING)
    assert capfd.readouterr().err == ""  # without Rust's backtrace
    model = {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "<unk>"}
    path.write_text(json.dumps({"model": model}))
    with pytest.raises(ValueError, match=r"t\.json cannot encode a text: WordLevel error"):
        load_tokenizer(str(path)).encode("b")


class _Panic(BaseException):
    """Like the exception of a panic in a Rust library, whose class cannot be imported."""


def test_a_panic_while_decoding_or_loading_is_one_message(tokenizer_json, monkeypatch, capfd):
    import tokenizers

    class Panicking:
        @staticmethod
        def from_str(json):
            raise _Panic("out of range.\nnote: more")

        def decode(self, ids, **options):
            os.write(2, b"backtrace\n")
            raise _Panic("out of range.\nnote: more")

    tokenizer = load_tokenizer(str(tokenizer_json))
    tokenizer._tokenizer = Panicking()
    with pytest.raises(ValueError, match=r"json cannot decode 2 ids: out of range\. note: more\.$"):
        tokenizer.decode([1, 2])
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(tokenizers, "Tokenizer", Panicking)
    with pytest.raises(ValueError, match=r"is not a Hugging Face tokenizer\.json: out of range"):
        load_tokenizer(str(tokenizer_json))


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
    with pytest.raises(ValueError, match=r"in the vocabulary .*; got 'x y'"):
        load_tokenizer(str(path), eot_token="x y")


def test_ids_beyond_int32(tokenizer_json, tmp_path):
    path = tmp_path / "t.json"
    content = json.loads(tokenizer_json.read_text())
    content["model"]["vocab"][max(content["model"]["vocab"])] = 2**31
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"t\.json must be at most 2147483646; got 2147483648"):
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
    with pytest.raises(ValueError, match="must be left out for the tokenizer 'bytes'"):
        load_tokenizer("bytes", eot_token="</s>")


def test_missing_packages_are_named(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(str(tokenizer_json))
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_tokenizer("hf:some/name")


def test_hub_repository(tokenizer_json, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    asked = []
    files = {"tokenizer.json": tokenizer_json}

    def download(name, file):
        asked.append((name, file))
        if file not in files:
            raise missing("it is not there")
        return str(files[file])

    class Absent(errors.EntryNotFoundError):
        def __init__(self, message):
            Exception.__init__(self, message)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    missing = Absent
    tokenizer = load_tokenizer("hf:some/name")
    assert asked == [("some/name", file) for file in ("tokenizer.json", "tokenizer_config.json")]
    assert tokenizer.spec == "hf:some/name"
    assert tokenizer.first_token == "eot"
    assert tokenizer.fingerprint == load_tokenizer(str(tokenizer_json)).fingerprint
    files["tokenizer_config.json"] = tmp_path / "c.json"
    files["tokenizer_config.json"].write_text('{"bos_token": "<|pad|>", "add_bos_token": true}')
    assert load_tokenizer("hf:some/name").first_ids == (1,)
    del files["tokenizer_config.json"]
    missing = errors.LocalEntryNotFoundError  # the file may exist, but the network is unreachable
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json cannot be downloaded \(not needed"
    ):
        load_tokenizer("hf:some/name")
    assert load_tokenizer("hf:some/name", first_token="eot").first_token == "eot"
    files.clear()
    missing = RuntimeError
    with pytest.raises(
        ValueError, match=r"hf:some/name: tokenizer.json cannot .*: it is not there"
    ):
        load_tokenizer("hf:some/name")
