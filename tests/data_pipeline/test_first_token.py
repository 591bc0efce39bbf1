"""The token that begins a text: the tokenizer's own rule, its record, and the option."""

import json
import pickle

import numpy as np
import pytest
from library_tokenizers import save
from read_back import windows

from flowhn_jax.commands import prepare as command
from flowhn_jax.data.open import read_tokenizer
from flowhn_jax.data.packing import target_mask
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.tokenizer import begin, load_tokenizer

TEXTS = ["the cat sat", "a dog and a cat </s>", "<s> the mat", "s"]
BOS, EOT = 1, 2  # <s> and </s> of `library_tokenizers`


def processors(name):
    """Return a post-processor: most add <s> before a text, 'two' adds <unk> and <s>."""
    from tokenizers import processors

    def template(text):
        special = [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
        return processors.TemplateProcessing(single=text, special_tokens=special)

    return {
        "none": None,
        "template": template("<s> $A"),
        "both ends": template("<s> $A </s>"),
        "two": template("<unk> <s> $A"),
        "end of text": template("</s> $A"),
        "sequence": processors.Sequence(
            [processors.ByteLevel(trim_offsets=False), template("<s> $A")]
        ),
        "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
        "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
        "bytes": processors.ByteLevel(),
    }[name]


def tokenizer_folder(folder, rule="template", kind="bpe_bytes", **settings):
    """Write a tokenizer.json, and a tokenizer_config.json of any settings; return its path."""
    import tokenizers

    path = save(folder, kind)
    library = tokenizers.Tokenizer.from_file(str(path))
    path.unlink()
    if (processor := processors(rule)) is not None:
        library.post_processor = processor
    library.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder / "tokenizer.json")


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("rule", "settings", "expected"),
    [
        ("none", {}, EOT),
        ("bytes", {}, EOT),
        ("template", {}, BOS),
        ("both ends", {}, BOS),
        ("sequence", {}, BOS),
        ("roberta", {}, BOS),
        ("bert", {}, BOS),
        ("end of text", {}, EOT),
        ("none", NAMES, EOT),
        ("none", NAMES | {"add_bos_token": False}, EOT),
        ("none", NAMES | {"add_bos_token": True}, BOS),
        ("none", {"bos_token": {"content": "<s>"}, "add_bos_token": True}, BOS),
        ("none", {"bos_token": "</s>", "add_bos_token": True}, EOT),
        ("none", {"bos_token": None, "add_bos_token": True}, EOT),
        ("template", NAMES | {"add_bos_token": False}, BOS),  # as in transformers 5
    ],
)
def test_the_rule_of_the_tokenizer(tmp_path, rule, settings, expected):
    spec = tokenizer_folder(tmp_path, rule, **settings)
    tokenizer = load_tokenizer(spec)
    assert tokenizer.first_ids == (expected,)
    assert tokenizer.first_token == ("bos" if expected == BOS else "eot")
    assert tokenizer.eot_id == EOT
    assert begin(tokenizer, [5]) == [expected, 5]
    assert read_tokenizer(str(tmp_path)).first_ids == (expected,)
    assert pickle.loads(pickle.dumps(tokenizer)).first_ids == (expected,)


@pytest.mark.parametrize("kind", ["bpe_bytes", "llama"])
@pytest.mark.parametrize("rule", ["template", "sequence", "roberta"])
def test_ids_are_those_of_transformers(tmp_path, kind, rule):
    """They agree for texts that do not spell a special token, which is plain text here."""
    transformers = pytest.importorskip("transformers")
    spec = tokenizer_folder(tmp_path, rule, kind, **NAMES)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=spec, **NAMES)
    ours = load_tokenizer(spec)
    for text in ("the cat sat", " a dog  and\na mat", "été"):
        expected = theirs(text).input_ids
        expected = expected[: -1 if rule == "roberta" else None]  # also adds </s> at the end
        assert begin(ours, ours.encode(text)) == expected
        assert ours.decode(expected) == ours.decode(ours.encode(text))


def test_ids_of_add_bos_token_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    spec = tokenizer_folder(tmp_path, "none", "llama", **NAMES, add_bos_token=True)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=spec, **NAMES, add_bos_token=True)
    ours = load_tokenizer(spec)
    assert begin(ours, ours.encode("the cat")) == theirs("the cat").input_ids


def test_first_token_overrides_the_rule(tmp_path):
    (tmp_path / "named").mkdir()
    with_rule = tokenizer_folder(tmp_path)
    named = tokenizer_folder(tmp_path / "named", "none", **NAMES)
    firsts = {"auto": (BOS,), "bos": (BOS,), "eot": (EOT,), "none": ()}
    for choice, first in firsts.items():
        tokenizer = load_tokenizer(with_rule, first_token=choice)
        assert tokenizer.first_ids == first
        assert tokenizer.fingerprint == load_tokenizer(with_rule).fingerprint
        expected = (EOT,) if choice == "auto" else first
        assert load_tokenizer(named, first_token=choice).first_ids == expected
        for each in (with_rule, named):  # whatever it was
            for before in firsts:
                tokenizer = load_tokenizer(each, first_token=before)
                assert tokenizer.beginning_with("auto") is tokenizer
                if choice != "auto":
                    assert tokenizer.beginning_with(choice).first_ids == first
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.first_ids == tokenizer.beginning_with("eot").first_ids == (256,)
    assert tokenizer.beginning_with("none").first_ids == ()
    assert begin(tokenizer.beginning_with("none"), b"ab") == [97, 98]
    assert load_tokenizer("bytes", first_token="none").first_token == "none"


def test_an_impossible_first_token_is_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    two, plain = tokenizer_folder(tmp_path, "two"), tokenizer_folder(tmp_path / "plain", "none")
    for spec in ("bytes", plain):
        with pytest.raises(ValueError, match=r"has no beginning-of-text token.* --first_token=eot"):
            load_tokenizer(spec, first_token="bos")
        with pytest.raises(ValueError, match="one of auto, bos, eot, none; got 'yes'"):
            load_tokenizer(spec, first_token="yes")
        with pytest.raises(ValueError, match="one of auto, bos, eot, none; got 'yes'"):
            load_tokenizer(spec).beginning_with("yes")
    with pytest.raises(ValueError, match="begins a text with several tokens, but only one is"):
        load_tokenizer(two)
    assert load_tokenizer(two, bos_token="<s>", first_token="bos").first_ids == (BOS,)
    for settings, message in (
        ({"bos_token": "<absent>", "add_bos_token": True}, "has no beginning-of-text token"),
        ({"bos_token": 5}, "bos_token in .* must be a string, .*; got 5"),
        (["<s>"], r"must hold an object; got \['<s>'\]"),
    ):
        (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(plain)
    (tmp_path / "plain" / "tokenizer_config.json").write_text(
        '{"flowhn_jax": {"first_token": "yes"}}'
    )
    with pytest.raises(ValueError, match="one of auto, bos, eot, none; got 'yes'"):
        read_tokenizer(str(tmp_path / "plain"))
    (tmp_path / "plain" / "tokenizer_config.json").write_text('{"flowhn_jax": "bos"}')
    with pytest.raises(ValueError, match=r"flowhn_jax in .* must be an object; got 'bos'"):
        read_tokenizer(str(tmp_path / "plain"))


def test_tokenizer_config_records_the_first_token(tmp_path):
    tokenizer_folder(tmp_path, **NAMES, flowhn_jax={"first_token": "eot"})
    assert read_tokenizer(str(tmp_path)).first_ids == (EOT,)
    assert read_tokenizer(str(tmp_path)).beginning_with("bos").first_ids == (BOS,)


@pytest.mark.parametrize("kind", ["unigram", "bpe_one_word", "wordlevel", "llama", "wordpiece"])
def test_no_text_is_encoded_as_the_first_token(tmp_path, kind):
    spec = tokenizer_folder(tmp_path, "template", kind)
    tokenizer = load_tokenizer(spec)
    for text in ("<s>", "the cat <s> the dog", "the cat<s></s>"):
        for loaded in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
            assert not {BOS, EOT} & set(loaded.encode(text).tolist())
    ids = tokenizer.encode("<s>the cat</s>", parse_special=True).tolist()
    assert (ids[0], ids[-1]) == (BOS, EOT)
    assert begin(tokenizer, ids) == ids
    assert tokenizer.decode(ids) == tokenizer.decode(ids[1:-1])


def test_prepared_documents_begin_with_the_first_token_and_end_with_end_of_text(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    spec = tokenizer_folder(tmp_path)
    made = {
        choice: prepare(
            str(source),
            spec,
            tmp_path / choice,
            context=8,
            validation_fraction=0.25,
            first_token=choice,
        )
        for choice in ("auto", "bos", "eot")
    }
    assert made["auto"].fingerprint == made["bos"].fingerprint != made["eot"].fingerprint
    assert [each.first_token for each in made.values()] == ["bos", "bos", "eot"]
    tokenizer = made["bos"].tokenizer
    documents = [tokenizer.encode(text).tolist() for text in TEXTS * 5]
    held_out = documents[3::4]
    for split, expected in (
        ("validation", held_out),
        ("train", [ids for n, ids in enumerate(documents) if n % 4 != 3]),
    ):
        tokens, segments = windows(made["bos"], split)
        mask = target_mask(segments)
        targets = [token for ids in expected for token in (*ids, EOT)]
        assert tokens[:, 1:][mask].tolist() == targets
        assert made["bos"].splits[split].tokens == len(targets) == mask.sum()
        assert tokens[0, 0] == BOS
        stream = [tokens[0, 0], *tokens[:, 1:][segments[:, 1:] != 0].tolist()]
        assert stream == [token for ids in expected for token in (BOS, *ids, EOT)]
        for key in ("tokens", "bytes", "documents"):  # do not depend on the first token
            counts = {getattr(each.splits[split], key) for each in made.values()}
            assert len(counts) == 1
    for choice, each in made.items():
        reopened = PreparedSet.open(tmp_path / choice)
        assert reopened == each
        assert reopened.tokenizer.first_ids == ((EOT,) if choice == "eot" else (BOS,))
        assert reopened.tokenizer.beginning_with("bos").first_ids == (BOS,)


def test_in_sets_without_a_record_end_of_text_begins_each_document(tmp_path, capsys):
    """They precede the record, when the tokenizer's rule was ignored."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    spec = tokenizer_folder(tmp_path)
    arguments = str(source), spec, tmp_path / "set"
    made = prepare(*arguments, context=8, validation_fraction=0.25, first_token="eot")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    recorded = index.pop("first_token"), index.pop("bos_token"), index["request"].pop("first_token")
    assert recorded == ("eot", "<s>", "eot")
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    old = PreparedSet.open(tmp_path / "set")
    assert old.first_token == "eot"
    assert old.fingerprint == made.fingerprint
    assert old.tokenizer.first_ids == (EOT,)
    tokens, segments = windows(old, "validation")
    assert tokens[0, 0] == EOT
    assert (np.diff(segments[0]) <= 1).all()
    assert target_mask(segments).sum() == old.splits["validation"].tokens
    again = prepare(*arguments, context=8, validation_fraction=0.25, first_token="eot")
    assert again == old
    with pytest.raises(
        ValueError,
        match=r"first_token: has 'eot', requested 'bos'\); choose another folder, or type "
        r"--first_token=eot to use it, or --overwrite to replace it",
    ):
        prepare(*arguments, context=8, validation_fraction=0.25)
    capsys.readouterr()


def test_prepare_refuses_other_first_tokens(tmp_path, jsonl):
    arguments = [f"--source={jsonl}", "--tokenizer=bytes", f"--out={tmp_path / 'set'}"]
    for value, message in (
        ("none", "first_token must be auto, bos or eot to prepare data; got 'none'"),
        ("x", "first_token must be one of auto, bos, eot, none; got 'x'"),
        ("bos", "first_token must be auto, eot or none for the tokenizer 'bytes'"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            command.run([*arguments, f"--first_token={value}"])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_token": "none"}, "first_token cannot be 'none'"),
        ({"first_token": "bos"}, "bos_token cannot be None"),
    ],
)
def test_an_impossible_record_is_refused(tmp_path, prepared, change, message):
    index = json.loads((prepared.folder / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        PreparedSet.open(tmp_path)
