"""The modes of eval.py give the same with their inputs in a bucket as with local ones."""

import json
import pathlib

import pytest

from flowhn_jax.bench import throughput
from flowhn_jax.data.prepare import prepare
from flowhn_jax.evaluation import evaluate as evaluation
from flowhn_jax.storage import place
from flowhn_jax.training.trainer import fit
from tests.slow import all_but
from tests.small import small_config

TASKS = pathlib.Path(__file__).parent.parent / "data" / "tasks"
PROMPTS = '{"prompt": "def "}\n"class A:"\n'


def config_for(data):
    return small_config(
        model={"context": 64},
        train={"steps": 2, "batch_size": 4},
        data={"path": str(data)},
        mesh={"data": 2},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run with its inputs: text.txt, set, run, tasks and prompts.jsonl."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_bytes(pathlib.Path(__file__).read_bytes())
    prepare(str(root / "text.txt"), "bytes", root / "set", context=64)
    fit(config_for(root / "set"), str(root / "run"), on_step=lambda *_: None)
    (root / "prompts.jsonl").write_text(PROMPTS)
    (root / "tasks").mkdir()
    for file in TASKS.iterdir():
        (root / "tasks" / file.name).write_bytes(file.read_bytes())
    return root


@pytest.fixture
def uploaded(trained, bucket, tmp_path, monkeypatch):
    """Return the inputs' folder in a bucket, with a set prepared there from the text there."""
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    root = place(bucket)
    (root / "text.txt").copy_from(trained / "text.txt")
    (root / "prompts.jsonl").write_whole(PROMPTS)
    for file in (trained / "tasks").iterdir():
        (root / "tasks" / file.name).copy_from(file)
    prepare(f"{bucket}/text.txt", "bytes", f"{bucket}/set", context=64)
    return root


MODES = {
    "own set": ("perplexity", lambda root: {}),
    "named set": ("perplexity", lambda root: {"data": f"{root}/set"}),
    "text": ("perplexity", lambda root: {"data": f"{root}/text.txt", "stride": 16}),
    "tasks": ("tasks", lambda root: {"tasks": "boolq,piqa", "task_dir": f"{root}/tasks"}),
    "generate": (
        "generate",
        lambda root: {"prompts": f"{root}/prompts.jsonl", "max_new_tokens": 9, "seed": 3},
    ),
    "recall": ("recall", lambda root: {"items": 2}),
    "throughput": ("throughput", lambda root: {"repeats": 1}),
}


@pytest.mark.parametrize("name", all_but(["named set", "tasks", "generate"], MODES))
def test_a_mode_gives_the_same(trained, uploaded, name, capsys):
    mode, options = MODES[name]
    results = []
    for root in (trained, uploaded):
        capsys.readouterr()
        evaluation.evaluate(
            config_for(f"{root}/set"),
            str(trained / "run"),
            mode,
            benchmarks={"throughput": throughput.measure},
            **options(root),
        )
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        for key in ("tokens_per_second", "task_dir"):
            result.pop(key, None)
        if mode == "throughput":
            result = set(result)
        elif mode == "perplexity":
            assert str(root) in result.pop("data")
        results.append(result)
    assert results[0] == results[1]


def test_absent_inputs_are_one_message(trained, bucket):
    def refused(message, mode, **options):
        with pytest.raises(FileNotFoundError, match=message):
            evaluation.evaluate(config_for(trained / "set"), str(trained / "run"), mode, **options)

    absent = f"{bucket}/absent"
    refused(f"--data must be a text file .*'{absent}' is neither", "perplexity", data=absent)
    refused(f"--prompts must be .*'{absent}' is not a file", "generate", prompts=absent)
    refused(f"--task_dir must be .*'{absent}' is no folder", "tasks", tasks="piqa", task_dir=absent)
    config = config_for(absent)
    with pytest.raises(FileNotFoundError, match=f"{absent} of prepared data .* --out={absent}$"):
        evaluation.evaluate(config, str(trained / "run"), "perplexity")
