"""The modes of eval.py on a run of two training steps."""

import csv
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tokenizers

from flowhn_jax import models
from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.config import DataConfig
from flowhn_jax.data.prepare import prepare
from flowhn_jax.evaluation import evaluate as evaluation
from flowhn_jax.interop import huggingface
from flowhn_jax.interop.transfer import export_run, import_run
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.trainer import fit
from tests.small import small_config

TASKS = pathlib.Path(__file__).parent.parent / "data" / "tasks"


def train(root, strategy):
    (root / "text.txt").write_bytes(pathlib.Path(__file__).read_bytes())
    prepare(str(root / "text.txt"), "bytes", str(root / "set"), context=64)
    config = small_config(
        strategy,
        model={"context": 64, "blocks": 2},
        train={"steps": 2, "batch_size": 4},
        data={"path": str(root / "set")},
        mesh={"data": 2},
    )
    fit(config, str(root / "run"))
    return root, config


@pytest.fixture(scope="module")
def fac(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fac"), "fac_split")


@pytest.fixture(scope="module")
def fai(tmp_path_factory):
    return train(tmp_path_factory.mktemp("fai"), "fai_split")


def evaluate(trained, mode, capsys, **options):
    """Return the printed lines before the last one, and the JSON object in the last."""
    root, config = trained
    capsys.readouterr()
    evaluation.evaluate(config, str(root / "run"), mode, **options)
    *lines, last = capsys.readouterr().out.removesuffix("\n").split("\n")
    return "\n".join(lines), json.loads(last)


def test_a_prompt_is_continued(fac, capsys):
    text, result = evaluate(fac, "generate", capsys, prompt="def ", max_new_tokens=12, seed=4)
    assert result["prompts"] == 1
    assert 1 <= result["tokens"] <= 12
    assert text.startswith(result["text"])
    assert result["tokens_per_second"] is None or result["tokens_per_second"] > 0
    again = evaluate(fac, "generate", capsys, prompt="def ", max_new_tokens=12, seed=4)[1]
    assert again["text"] == result["text"]


def test_prompts_in_a_file_end_at_the_context(fac, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("import os\n\nclass A:\n")
    options = dict(prompts=str(tmp_path / "prompts.txt"), max_new_tokens=70, temperature=0.0)
    text, result = evaluate(fac, "generate", capsys, **options)
    assert result["prompts"] == len(result["text"]) == 2
    for prompt, continuation in zip(["import os", "class A:"], result["text"], strict=True):
        assert f"--- {prompt}\n{continuation}" in text
    if "context" in result["finish"]:
        assert (
            "ended at 64 tokens, the context fac_split is planned for. --replan continues" in text
        )
    _, replanned = evaluate(fac, "generate", capsys, **options, replan=True)
    assert "context" not in replanned["finish"]


def test_tasks(fac, capsys):
    text, result = evaluate(fac, "tasks", capsys, tasks="piqa,winogrande", task_dir=str(TASKS))
    assert result["piqa"]["n"] == result["winogrande"]["n"] == 6
    assert "| piqa " in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fac", "fai"])
def test_recall(name, capsys, request):
    trained = request.getfixturevalue(name)
    lengths = None if name == "fac" else "64,200"
    text, result = evaluate(trained, "recall", capsys, items=5, lengths=lengths)
    found = [(each["task"], each["length"]) for each in result["results"]]
    tokens = [64] if name == "fac" else [64, 200]
    assert found == [(task, n) for task in ("associative", "needle") for n in tokens]
    for each in result["results"]:
        assert 0 <= each["accuracy"] <= 1
        assert each["log_likelihood"] < 0
        assert len(each["accuracy_by_depth"]) == 4
    assert "| needle" in text


@pytest.mark.parametrize("data", [None, "text.txt", "set"])
def test_perplexity_by_position_has_the_same_mean(fac, data, capsys):
    root, _ = fac
    options = {} if data is None else {"data": str(root / data)}
    plain = evaluate(fac, "perplexity", capsys, **options)[1]
    text, curve = evaluate(fac, "perplexity", capsys, **options, by_position=True)
    assert "by_position.csv, .png" in text
    for key, value in plain.items():
        assert curve[key] == (pytest.approx(value, rel=1e-5) if key != "data" else value)
    with (root / "run" / "by_position.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["targets"]) for row in rows) == plain["tokens"]
    total = sum(int(row["targets"]) * float(row["nll"]) for row in rows)
    assert total / plain["tokens"] == pytest.approx(plain["nll"], rel=1e-5)
    assert all(float(row["standard_error"]) > 0 for row in rows if int(row["targets"]) > 5)
    if data == "text.txt":  # windows of one document: target counts differ by one at most
        assert [int(row["tokens_before"]) for row in rows] == list(range(1, 65))
        counts = {int(row["targets"]) for row in rows}
        assert max(counts) - min(counts) <= 1
        words = len((root / "text.txt").read_text().split())
        assert plain["words"] == words
        expected = np.exp(plain["nll"] * plain["tokens"] / words) if words else None
        assert plain["word_perplexity"] == pytest.approx(min(expected, np.inf))
    assert (root / "run" / "by_position.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_longer_contexts_than_in_training(fai, capsys):
    """Every byte is scored once, in windows that only the interleaved split can read."""
    root, config = fai
    text = root / "text.txt"
    found = evaluate(fai, "perplexity", capsys, data=str(text), context=192)[1]
    assert found["context"] == found["stride"] == 192
    params = load_params(str(root / "run"), config.model, make_mesh(config.mesh, 4))
    ids = np.array([256, *text.read_bytes()])
    total = 0.0
    for start in range(0, len(ids) - 1, 192):
        window = ids[start : start + 193]
        padded = np.pad(window[:-1], (0, 193 - len(window)))
        logits = np.asarray(models.forward(config.model, params, padded[None])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_p[np.arange(len(window) - 1), window[1:]].sum()
    assert found["nll"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_a_run_is_exported_and_imported_again(fac, capsys, tmp_path):
    root, config = fac
    out, back = tmp_path / "out", tmp_path / "back"
    export_run(str(root / "run"), str(out))
    files = {"config.json", "model.safetensors", "modeling_flowhn.py", "README.md"}
    files |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == files
    loaded = huggingface.load(out)
    params = load_params(str(root / "run"), config.model, make_mesh(config.mesh, 4))
    assert loaded[0] == config.model
    jax.tree.map(np.testing.assert_array_equal, loaded[1], params)
    import_run(str(out), str(back))
    tokens = np.arange(40)[None]
    imported = load_params(str(back), config.model, make_mesh(config.mesh, 4))
    logits = (models.forward(config.model, p, tokens) for p in (params, imported))
    np.testing.assert_array_equal(*logits)
    capsys.readouterr()
    options = dict(prompt="a", max_new_tokens=3)
    evaluation.evaluate(config, str(back), "generate", **options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["text"] == evaluate(fac, "generate", capsys, **options)[1]["text"]
    with pytest.raises(ValueError, match="--workdir must be a new or empty folder"):
        import_run(str(out), str(back))
    with pytest.raises(
        ValueError, match="holds parameters alone, as that of an imported model does"
    ):
        fit(config, str(back))


@pytest.mark.slow
def test_the_tokenizer_is_exported_and_imported_too(tmp_path, capsys):
    """Including the end-of-text token that the data were prepared with."""
    vocabulary = {"<end>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="a")
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bpe.decoder = tokenizers.decoders.Metaspace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b a b ab ba\n" * 200)
    source, tokenizer = str(tmp_path / "text.txt"), str(tmp_path / "tokenizer.json")
    prepare(source, tokenizer, str(tmp_path / "set"), context=24, eot_token="<end>")
    config = small_config(
        "fai_split",
        model={"vocab_size": 8, "blocks": 2},
        train={"steps": 1, "batch_size": 4},
        data={"path": str(tmp_path / "set")},
        mesh={"data": 1},
    )
    fit(config, str(tmp_path / "run"))
    export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    message = import_run(str(tmp_path / "out"), str(tmp_path / "back"))
    assert message.endswith("with its tokenizer")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    back = str(tmp_path / "back")
    alone = dataclasses.replace(config, data=DataConfig())
    results = []
    for each, workdir in ((config, str(tmp_path / "run")), (alone, back)):
        capsys.readouterr()
        evaluation.evaluate(each, workdir, "perplexity", data=source)
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1])["nll"])
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="--data must name a text file or a prepared set"):
        evaluation.evaluate(alone, back, "perplexity")
    (tmp_path / "back" / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is not JSON"):
        evaluation.evaluate(alone, back, "perplexity", data=source)


def test_a_set_with_another_tokenizer_is_refused(fac, tmp_path):
    root, config = fac
    vocabulary = {"<eos>": 0, "a": 1}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="a"))
    bpe.save(str(tmp_path / "t.json"))
    (tmp_path / "text.txt").write_text("aaaa aaa\n" * 100)
    text = str(tmp_path / "text.txt")
    prepare(text, str(tmp_path / "t.json"), str(tmp_path / "set"), context=64)
    with pytest.raises(
        ValueError, match=r"must have the tokenizer of the run in .*, bytes; it has"
    ):
        evaluation.evaluate(config, str(root / "run"), "perplexity", data=str(tmp_path / "set"))
    larger = pathlib.Path(__file__).parent.parent / "data" / "tokenizer.json"
    prepare(text, str(larger), str(tmp_path / "larger"), context=64)
    with pytest.raises(ValueError, match=r"at least 512, .* with --config.model.vocab_size=512$"):
        evaluation.evaluate(config, str(root / "run"), "perplexity", data=str(tmp_path / "larger"))


def test_errors_say_what_an_option_must_be(fac, tmp_path, capsys):
    root, config = fac
    workdir = str(root / "run")

    def refused(error, message, mode, **options):
        with pytest.raises(error, match=message):
            evaluation.evaluate(config, workdir, mode, **options)

    refused(ValueError, "--seed is an option of --mode=generate and recall;", "tasks", seed=1)
    refused(ValueError, "needs --prompt=TEXT or --prompts=FILE", "generate")
    refused(ValueError, "needs --prompt=.* not both", "generate", prompt="a", prompts="b")
    refused(ValueError, "Prompt 1 must not be empty", "generate", prompt="")
    refused(
        ValueError, "temperature must be .*; got -1.0", "generate", prompt="a", temperature=-1.0
    )
    refused(ValueError, "at most 64 tokens, .*; got 71", "generate", prompt="a" * 70)
    refused(FileNotFoundError, "--prompts must be .*'nowhere'", "generate", prompts="nowhere")
    refused(ValueError, "needs --tasks, names from lambada", "tasks")
    folder = str(tmp_path)
    refused(ValueError, "--tasks must be .*; got 'x'", "tasks", tasks="x", task_dir=folder)
    refused(
        FileNotFoundError, r"must have a file piqa\*.jsonl", "tasks", tasks="piqa", task_dir=folder
    )
    lengths = "--lengths must be numbers from 64 to 64, the context fac_split is planned for"
    refused(ValueError, f"{lengths}, .*; got '65'", "recall", lengths="65")
    refused(ValueError, lengths, "recall", lengths="9" * 1000)
    refused(ValueError, "--items must be 1 to .*; got 0", "recall", items=0)
    refused(
        ValueError,
        "--first_token is an option of .*; it has no effect with --mode=recall",
        "recall",
        first_token="eot",
    )
    begins = {"data": str(root / "text.txt"), "first_token": "none"}
    refused(ValueError, "must be bos or eot for perplexity", "perplexity", **begins)
    options = dict(prompt="a", tasks="piqa", task_dir=str(TASKS), data=begins["data"])
    for mode, names in (
        ("generate", ["prompt"]),
        ("tasks", ["tasks", "task_dir"]),
        ("perplexity", ["data"]),
    ):
        given = {name: options[name] for name in names}
        refused(
            ValueError,
            "tokenizer 'bytes', which has no beginning-of-",
            mode,
            **given,
            first_token="bos",
        )
        refused(ValueError, "must be one of auto, .*; got 'x'", mode, **given, first_token="x")
    text = str(root / "text.txt")
    refused(
        ValueError, "--context must be 1 to 64, .*; got 65", "perplexity", data=text, context=65
    )
    refused(ValueError, "--context needs --data=FILE", "perplexity", context=32)
    other = dataclasses.replace(config, model=small_config("ae_split").model)
    with pytest.raises(ValueError, match="another model than --config"):
        evaluation.evaluate(other, workdir, "generate", prompt="a")
    for content, message in (
        (b"ok\n\xff\n", "line 2, must be UTF-8"),
        (b"\n", "must have a prompt per line"),
    ):
        (tmp_path / "p.txt").write_bytes(content)
        refused(ValueError, message, "generate", prompts=str(tmp_path / "p.txt"))
    for content, message in (
        (b'{"prompt": "a"}\n{', "line 2, is not JSON"),
        (b'{"text": "a"}', "must be a string or an object with 'prompt'"),
    ):
        (tmp_path / "p.jsonl").write_bytes(content)
        refused(ValueError, message, "generate", prompts=str(tmp_path / "p.jsonl"))
