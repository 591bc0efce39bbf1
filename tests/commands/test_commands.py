"""The command lines, as a user calls them."""

import json

import pytest

from tests.command_line import ROOT, call

TINY = "--config=configs/flowhn_tiny.py"


def succeed(*arguments):
    run = call(*arguments)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "--config must have a value"),
        (["train.py", TINY], "--workdir must have a value"),
        (
            ["train.py", "--config=configs/nope.py", "--workdir=x"],
            "--config must be the file of a recipe; there is no 'configs/nope.py'. Recipes in "
            "configs/: baseline_135m.py",
        ),
        (["train.py", "--config=README.md", "--workdir=x"], "--config cannot be loaded"),
        (["train.py", f"{TINY}:fac", "--workdir=x"], "must be one of no_split, ae_split"),
        (
            ["train.py", TINY, "--config.model.splt.period=32", "--workdir=x"],
            "Unknown config key 'model.splt.period'; the nearest is 'model.split.period'",
        ),
        (["train.py", TINY, "--config.model.width=wide", "--workdir=x"], "'wide'"),
        (
            ["train.py", TINY, "--config.model.width=66", "--workdir=x"],
            "model.width must be a multiple of model.heads (4), e.g. 64 or 68; got 66.",
        ),
        (
            ["train.py", "--config=configs", "--workdir=x"],
            "--config is 'configs', which is no file",
        ),
        (
            ["train.py", TINY, f"--config.model.width={10**300}", "--workdir=x"],
            "model.width is an integer of more than 40 digits; accepted is at most 2147483647",
        ),
        (["train.py", TINY, f"--workdir={'x' * 10**5}"], "File name too long: 'xxx"),
        (["train.py", TINY, "--config.train.clip_norm=nan", "--workdir=x"], "clip_norm is nan"),
        (
            ["eval.py", "--mode=perplexity", f"--stride={10**300}"],
            "--stride is an integer of more than 40 digits; accepted is at most 4294967295",
        ),
        (["eval.py", "--mode=generate", "--top_p=nan"], "--top_p is nan; accepted is a finite"),
        (["eval.py", "--mode=tasks", f"--repeats={'x' * 10**5}"], "invalid literal for int()"),
        (["train.py", TINY, "--workdir=x", "--steps=3"], "Unknown command line flag 'steps'"),
        (["train.py", TINY, "--workdir=x", "again"], "Unexpected argument 'again'"),
        (["eval.py", TINY], "--mode must have a value"),
        (["eval.py", TINY, "--mode=quality"], "perplexity|throughput|tasks|recall|generate"),
        (["eval.py", "--mode=tasks"], "--config, a recipe, or --workdir, the folder of a run"),
        (["eval.py", TINY, "--mode=generate", "--prompt=a"], "needs --workdir"),
        (["-m", "flowhn_jax.data.synthetic", "--out=x", "--tasks=needl"], "must be among assoc"),
        (["-m", "flowhn_jax.interop", "export", "--workdir=nowhere", "--out=x"], "holds no run"),
        (["-m", "flowhn_jax.interop", "import", "--workdir=x"], "import needs --source"),
        (["-m", "flowhn_jax.bench", "decode", TINY], "must be at least 512"),
        (["eval.py", TINY, "--mode=perplexity"], "needs --workdir"),
        (["eval.py", TINY, "--mode=perplexity", "--workdir=nowhere"], "holds no run"),
        (["-m", "flowhn_jax.split", TINY, "--lengths=1,x"], "--lengths is '1,x'"),
        (["-m", "flowhn_jax.split", TINY, "--plot=plan.xyz"], "Cannot draw to 'plan.xyz'"),
        (["-m", "flowhn_jax.aot", TINY], "--topology must have a value"),
        (["-m", "flowhn_jax.aot", TINY, "--topology=v5e:3x3"], "must be one of v4:2x2x1 2x2x2"),
        (["-m", "flowhn_jax.compare"], "--size must have a value"),
        (["-m", "flowhn_jax.compare", "--size=2b"], "--size must be one of tiny, 135m, 350m, 1b"),
        (
            ["-m", "flowhn_jax.compare", "--size=tiny", "--models=llama,mambo"],
            "--models must be all or names from no_split, ae_split",
        ),
        (
            ["train.py", "--config=configs/baseline_tiny.py:lama", "--workdir=x"],
            "'lama'; accepted are llama, mamba1, mamba2, jamba, shm, hymba, falcon_h1",
        ),
        (
            ["-m", "flowhn_jax.split", "--config=configs/baseline_tiny.py:llama"],
            "model.kind must be 'flowhn' for the command split; got 'llama'.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_one_clear_message(arguments, message):
    run = call(*arguments)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert message in run.stderr
    assert any(line.startswith("error: ") for line in run.stderr.splitlines())
    assert len(run.stderr) < 5000
    assert not (ROOT / "x").exists()


def test_split_table():
    text = succeed("-m", "flowhn_jax.split", "--config=configs/flowhn_135m.py").stdout
    assert "132,396,448 parameters" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["0", "576", "448"] in [row[:3] for row in rows]
    assert "448-1023" in text
    assert "0-447 896-1023" in text
    assert "reach 0.6176" in text


def test_split_table_over_lengths_and_picture(tmp_path):
    picture = tmp_path / "plan.png"
    text = succeed(
        "-m",
        "flowhn_jax.split",
        "--config=configs/flowhn_135m.py:fa_split",
        "--lengths=1024,131072",
        f"--plot={picture}",
    ).stdout
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("1,0", "131"))]
    assert [row[0] for row in rows] == ["1,024", "131,072"]
    assert rows[0][1:4:2] == ["577", "576"]
    assert all(float(row[2]) < 2 for row in rows)
    assert "warning: fa_split cuts the positions into the same two sets" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_train_then_eval(tmp_path):
    """The README's two commands, with a smaller model and fewer steps."""
    sizes = ["--config.model.width=32", "--config.model.mlp_width=32", "--config.model.blocks=2"]
    sizes += ["--config.model.context=32", "--config.train.batch_size=4"]
    steps = ["--config.train.steps=3", "--config.train.eval_windows=4"]
    workdir = f"--workdir={tmp_path / 'run'}"
    trained = succeed("train.py", TINY, workdir, *sizes, *steps).stdout
    assert "step      3/3" in trained
    assert "bits/byte" in trained
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 9)
    options = [TINY, workdir, *sizes, *steps]
    scored = succeed("eval.py", *options, "--mode=perplexity", f"--data={text}").stdout
    result = json.loads(scored.splitlines()[-1])
    assert result["bytes"] == result["tokens"] == len(text.read_bytes())
    assert 2 < result["bits_per_byte"] < 9
