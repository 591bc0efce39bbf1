"""The token that begins a text in generation, tasks and perplexity."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers

from flowhn_jax import models
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.open import read_tokenizer
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation import evaluate as evaluation
from flowhn_jax.evaluation import generate as generation
from flowhn_jax.evaluation import perplexity
from flowhn_jax.evaluation.generate import generate
from flowhn_jax.evaluation.sampling import Sampling
from flowhn_jax.evaluation.scoring import Pair, encode_pair
from flowhn_jax.interop import tokenizer_files
from flowhn_jax.parallel.mesh import make_mesh
from tests.small import small_baseline, small_config

VOCABULARY = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "▁": 4, "▁a": 5, "▁b": 6}
BOS, EOT = 0, 1
TEXTS = ["a ba", "bb", "aab b", "b"]


def save(folder, kind):
    """Save a tokenizer.json: 'template' and 'two' add tokens, 'llama' does so by its settings."""
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(VOCABULARY, [("▁", "a"), ("▁", "b")], unk_token="a")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens(["<s>", "</s>"])
    if kind in ("template", "two"):
        library.post_processor = tokenizers.processors.TemplateProcessing(
            "<s> $A" if kind == "template" else "</s> <s> $A",
            special_tokens=[("<s>", BOS), ("</s>", EOT)],
        )
    folder.mkdir(exist_ok=True)
    if kind == "llama":
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.fixture(params=["template", "llama"])
def with_bos(request, tmp_path):
    """Return a tokenizer whose texts begin with <s>, and the library's ids as a function."""
    path = save(tmp_path / request.param, request.param)
    library = tokenizers.Tokenizer.from_file(path)

    def ids(text):
        return [BOS, *library.encode(text, add_special_tokens=False).ids]

    if request.param == "template":
        assert library.encode("ab").ids == ids("ab")
    return load_tokenizer(path), ids


@pytest.fixture(scope="module")
def llama():
    config = small_baseline("llama", vocab_size=8)
    return config, models.init(config, jax.random.key(0))


def prefilled(monkeypatch):
    """Return a list that receives all prefilled windows."""
    found = []
    prefill = models.prefill

    def recorded(config, params, tokens, lengths, **options):
        found.extend(row[:length].tolist() for row, length in zip(tokens, lengths, strict=True))
        return prefill(config, params, tokens, lengths, **options)

    monkeypatch.setattr(models, "prefill", recorded)
    return found


def test_ids_of_prompts_are_those_of_transformers(with_bos, llama, monkeypatch):
    """Giving a text and giving its ids is the same."""
    tokenizer, ids = with_bos
    options = dict(tokenizer=tokenizer, max_new_tokens=2, sampling=Sampling(temperature=0))
    found = prefilled(monkeypatch)
    texts = generate(*llama, TEXTS, **options)
    assert sorted(found) == sorted(map(ids, TEXTS))
    found.clear()
    by_ids = generate(*llama, [ids(text) for text in TEXTS], **options)
    assert sorted(found) == sorted(map(ids, TEXTS))
    assert texts == by_ids
    for choice, first in (("eot", [EOT]), ("none", [])):
        found.clear()
        generate(*llama, ["a ba"], **options | {"tokenizer": tokenizer.beginning_with(choice)})
        assert found == [[*first, *ids("a ba")[1:]]]


def test_the_penalty_counts_the_bos_as_transformers_does(with_bos, llama, monkeypatch):
    """But it does not count the end-of-text token, which only we put before a text."""
    tokenizer, ids = with_bos
    seen = []

    def advance(config, sampling, vocab_size, params, key, logits, cache, before, numbers, step):
        seen.append(set(np.flatnonzero(before[0]).tolist()))
        return np.zeros(1, int), (logits, cache, before)

    monkeypatch.setattr(generation, "_advance", advance)
    for choice in ("auto", "eot"):
        each = tokenizer.beginning_with(choice)
        generate(*llama, ["ab"], tokenizer=each, max_new_tokens=1)
    assert seen == [set(ids("ab")), set(ids("ab")[1:])]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "Prompt 1 must not be empty"),
        ([2, 9], "ids of prompt 1 must be 0 to 6; got 2 to 9"),
        ([-1], "ids of prompt 1 must be 0 to 6; got -1 to -1"),
    ],
)
def test_prompts_that_are_not_ids_are_refused(tmp_path, llama, prompt, message):
    tokenizer = load_tokenizer(save(tmp_path / "t", "none"))
    with pytest.raises(ValueError, match=message):
        generate(*llama, [prompt], tokenizer=tokenizer)


def test_a_prompt_without_a_token_is_refused(tmp_path, llama):
    """Unknown text has no ids if the unknown token is the end-of-text token."""
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>")
    )
    library.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"), first_token="none")
    with pytest.raises(ValueError, match="Prompt 1 must have at least one token"):
        generate(*llama, ["b"], tokenizer=tokenizer)


def test_ids_of_task_pairs_are_those_of_transformers(with_bos):
    tokenizer, ids = with_bos
    whole = ids("a b")
    assert encode_pair(tokenizer, "a", " b") == encode_pair(tokenizer, "a ", "b")
    assert encode_pair(tokenizer, "a", " b") == Pair(whole[:2], whole[2:])
    assert encode_pair(tokenizer, "", "a b") == Pair([BOS], whole[1:])
    eot, nothing = (tokenizer.beginning_with(choice) for choice in ("eot", "none"))
    assert encode_pair(eot, "a", " b") == Pair([EOT, *whole[1:2]], whole[2:])
    assert encode_pair(nothing, "a", " b") == Pair(whole[1:2], whole[2:])
    assert encode_pair(nothing, "", "a b") == Pair([EOT], whole[1:])  # as the harness


def test_parsed_text_may_contain_the_first_token_itself(with_bos):
    tokenizer, ids = with_bos
    assert encode_pair(tokenizer, "<s>a", " b").context[1:] != ids("a")[1:]
    pair = encode_pair(tokenizer, "<s>a</s>", "b", parse_special=True)
    assert (pair.context[0], pair.context[-1], pair.context.count(BOS)) == (BOS, EOT, 1)


def test_ids_of_scored_texts_are_those_of_transformers(with_bos):
    tokenizer, ids = with_bos
    config = small_config("fai_split")
    text = "a b ab ba"

    def tokens(choice):
        batches = perplexity.text_batches(
            config, text.encode(), tokenizer.beginning_with(choice), 24, 24
        )
        (window,) = batches
        assert window["weights"].sum() == len(ids(text)) - 1
        return window["tokens"][0, : len(ids(text))].tolist()

    assert tokens("auto") == ids(text)
    assert tokens("eot") == [EOT, *ids(text)[1:]]
    with pytest.raises(ValueError, match=r"must be bos or eot for perplexity.*'none'"):
        tokens("none")


def test_documents_of_a_set_must_begin_with_the_runs_first_token(tmp_path):
    """Unless --first_token names another one."""
    (tmp_path / "text.txt").write_text("a b a b ab ba\n" * 200)
    source, tokenizer = str(tmp_path / "text.txt"), save(tmp_path / "t", "template")
    for choice in ("bos", "eot"):
        prepare(source, tokenizer, tmp_path / choice, context=24, first_token=choice)
    config = small_config("fai_split", data={"path": str(tmp_path / "bos")})
    trained = evaluation.TrainedModel(config, {}, None, str(tmp_path / "run"))
    assert evaluation._open_sets(trained, None, "auto").main.first_token == "bos"
    eot = str(tmp_path / "eot")
    assert evaluation._open_sets(trained, eot, "eot").main.first_token == "eot"
    with pytest.raises(
        ValueError,
        match=r"begin with bos; they begin with eot. Type --first_token=eot, or .*=bos",
    ):
        evaluation._open_sets(trained, eot, "auto")


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        *[
            (kind, each)
            for kind in ("template", "llama", "none")
            for each in ("auto", "bos", "eot")
        ],
        ("two", "bos"),
        ("two", "eot"),
    ],
)
def test_an_export_records_what_begins_a_text(tmp_path, kind, choice):
    """Prepared data keep only the tokenizer.json."""
    bos_token = "<s>" if kind in ("none", "two") else None
    tokenizer = load_tokenizer(save(tmp_path / "t", kind), None, bos_token, choice)
    (tmp_path / "out").mkdir()
    files = tokenizer_files.files_for({}, tokenizer)
    tokenizer_files.write(tmp_path / "out", files)
    assert read_tokenizer(str(tmp_path / "out")).first_ids == tokenizer.first_ids
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["bos_token"] == "<s>"
    assert ("flowhn_jax" in settings) == (kind in ("template", "two") and choice == "eot")
    # transformers takes every key of this form for a special token and adds it to the vocabulary.
    assert {key for key in settings if key.endswith("_token")} <= {
        *("bos_token", "eos_token", "pad_token", "add_bos_token")
    }


def test_validation_scores_documents_from_their_bos_to_their_end(tmp_path):
    """Each as if it were alone; its first token, <s>, is not scored."""
    (tmp_path / "s.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    path = save(tmp_path / "t", "template")
    options = dict(context=32, validation_fraction=0.5)
    prepared = prepare(str(tmp_path / "s.jsonl"), path, tmp_path / "set", **options)
    model = small_baseline("llama", vocab_size=8, context=32, blocks=2)
    config = dataclasses.replace(small_config(), model=model)
    params = models.init(model, jax.random.key(0))
    mesh = make_mesh(MeshConfig(data=1), 8)
    with jax.set_mesh(mesh):
        found = perplexity.validate(
            config, mesh, perplexity.make_eval_step(config), params, prepared
        )
    total = count = 0
    for text in TEXTS[1::2]:
        ids = prepared.tokenizer.encode(text).tolist()
        targets = [*ids, EOT]
        logits = models.forward(model, params, np.array([[BOS, *ids]]))[0]
        total -= float(jax.nn.log_softmax(logits)[np.arange(len(targets)), targets].sum())
        count += len(targets)
    assert (found.tokens, found.bytes) == (count, len("".join(TEXTS[1::2])))
    assert found.nll * found.tokens == pytest.approx(total, rel=1e-5)
