"""The command lines, as a user calls them."""

import json

import pytest

from tests.command_line import ROOT, call

TINY = "--config=configs/flowhn_tiny.py"
SWEEP = ("-m", "flowhn_jax.sweep", TINY, "--workdir=x")


def succeed(*arguments):
    run = call(*arguments)
    assert run.returncode == 0, run.stderr
    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.py"], "--config and --workdir must be given; --config is: recipe"),
        (["train.py", TINY], "--workdir must be given; --workdir is: folder for checkpoints"),
        (
            ["train.py", "--config=configs/nope.py", "--workdir=x"],
            "'configs/nope.py'",
        ),
        (["train.py", "--config=nope:fai_split", "--workdir=x"], "'nope'"),
        (["train.py", "--config=README.md", "--workdir=x"], "--config must be a recipe"),
        (["train.py", f"{TINY}:fac", "--workdir=x"], "'fac'"),
        (
            ["train.py", TINY, "--config.model.splt.period=32", "--workdir=x"],
            "unknown config key 'model.splt.period'; the nearest is --config.model.split.period",
        ),
        (
            ["train.py", "--config.model.width=32", "--workdir=x", TINY],
            "--config must be given before its keys, e.g. --config=flowhn_tiny --config.model.wid",
        ),
        (["train.py", TINY, "--config.model.width=wide", "--workdir=x"], "'wide'"),
        (["train.py", TINY, "--config.model.width=66", "--workdir=x"], "64 or 68"),
        (["train.py", "--config=configs", "--workdir=x"], "baseline_135m, baseline_1b"),
        (
            ["train.py", TINY, f"--config.model.width={10**300}", "--workdir=x"],
            "model.width must be at most 2147483647; got an integer of more than 40 digits",
        ),
        (["train.py", TINY, f"--workdir={'x' * 10**5}"], "File name too long: 'xxx"),
        (
            ["train.py", TINY, "--config.train.clip_norm=nan", "--workdir=x"],
            "train.clip_norm must be a finite number; got nan",
        ),
        (
            ["eval.py", "--mode=perplexity", f"--stride={10**300}"],
            "--stride must be at most 4294967295; got an integer of more than 40 digits",
        ),
        (["eval.py", "--mode=generate", "--top_p=nan"], "--top_p must be a finite number; got nan"),
        (
            ["eval.py", "--mode=tasks", f"--repeats={'x' * 10**5}"],
            "--repeats must be an integer; got",
        ),
        (
            ["train.py", TINY, "--workdir=x", "--steps=3"],
            "unknown flag --steps; perhaps --config.train.steps",
        ),
        (["train.py", TINY, "--workdir=x", "--wrkdir=y"], "perhaps --workdir"),
        (["train.py", TINY, "--workdir="], "--workdir must be a path; got ''"),
        (["train.py", TINY, "--workdir=x", f"--{'q' * 300}"], "--help lists the flags"),
        (["train.py", TINY, "--workdir=x", "again"], "unexpected argument 'again'"),
        (["eval.py", "--mode=generate", "--top_p=a: b"], "--top_p must be a number; got 'a: b'"),
        (["eval.py", TINY], "--mode must be given"),
        (
            ["eval.py", TINY, "--mode=quality"],
            "tasks, recall, generate; got 'quality'.",
        ),
        (["eval.py", "--mode=tasks"], "--workdir"),
        (["eval.py", TINY, "--mode=generate", "--prompt=a"], "--workdir"),
        (["-m", "flowhn_jax.data.synthetic", "--out=x", "--tasks=needl"], "'needl'"),
        (["-m", "flowhn_jax.data.synthetic"], "--out must be given"),
        (["-m", "flowhn_jax.data.prepare", "--out=x"], "--source and --tokenizer must be given"),
        (
            ["-m", "flowhn_jax.interop", "export", "--workdir=nowhere", "--out=x"],
            "must be the folder of a run",
        ),
        (["-m", "flowhn_jax.interop", "export", "--workdir=x"], "--out must be given"),
        (["-m", "flowhn_jax.interop", "import", "--workdir=x"], "--source must be given"),
        (
            ["-m", "flowhn_jax.interop", "exprot", "--workdir=x"],
            "the command must be one of export, import; got 'exprot'; perhaps export",
        ),
        (["-m", "flowhn_jax", "trian", TINY], "perhaps train"),
        (["-m", "flowhn_jax.bench", "decode", TINY], "512"),
        (["-m", "flowhn_jax.bench", "decode"], "--config must be given"),
        (["-m", "flowhn_jax.bench", "decod"], "must be one of suite, kernels"),
        (["-m", "flowhn_jax.bench"], "decode; got nothing"),
        (["-m", "flowhn_jax.bench", "suite", "--compare", "x"], "--compare takes two folders"),
        (["eval.py", TINY, "--mode=perplexity"], "--workdir"),
        (
            ["eval.py", TINY, "--mode=perplexity", "--workdir=nowhere"],
            "must be the folder of a run",
        ),
        (
            ["-m", "flowhn_jax.split", TINY, "--lengths=1,x"],
            "--lengths must be whole numbers separated by commas, e.g. 1024,8192; got '1,x'",
        ),
        (["-m", "flowhn_jax.split", TINY, "--plot=plan.xyz"], "Cannot draw to 'plan.xyz'"),
        (["-m", "flowhn_jax.aot", TINY], "--topology must be given"),
        (["-m", "flowhn_jax.aot", TINY, "--topology=v5e:3x3"], "v4:2x2x1 2x2x2"),
        (
            ["-m", "flowhn_jax.aot", TINY, "--topology=v5e:1x1", "--out=x"],
            "--out must be given with --roofline",
        ),
        (
            ["-m", "flowhn_jax.aot", TINY, "--topology=v5e:1x1", "--roofline", "--mfu=0.4"],
            "--mfu must be left out with --roofline",
        ),
        (
            ["-m", "flowhn_jax.aot", TINY, "--topology=v5e:1x1", "--roofline", "--xla=fast"],
            "--xla must be NAME=VALUE, e.g. xla_tpu_scoped_vmem_limit_kib=65536; got 'fast'",
        ),
        (
            ["-m", "flowhn_jax.aot", TINY, "--topology=v5e:1x1", "--roofline", "--diff=nothing"],
            "--diff must be a file that --roofline --out wrote; got 'nothing': No such file",
        ),
        (
            ["-m", "flowhn_jax.aot", TINY, "--topology=v5e:1x1", "--roofline", "--plan_only"],
            "--plan_only must be left out with --roofline",
        ),
        (["-m", "flowhn_jax.compare"], "--size must be given"),
        (
            ["-m", "flowhn_jax.compare", "--size=tiny", "--rounds=0"],
            "--rounds must be an integer in the range [1, 1000]; got 0.",
        ),
        (["-m", "flowhn_jax.report", "--out=x"], "the folder of a run must be given, e.g. flowhn"),
        (["-m", "flowhn_jax.report", "nowhere"], "--out must be given"),
        (["-m", "flowhn_jax.report", "nowhere", "--out=x"], "must be the folder of a run"),
        (["-m", "flowhn_jax.report", "s3://b/x", "--out=x"], "paths must be local or begin with"),
        ([*SWEEP], "--grid must be given, e.g. --grid=train.learning_rate=1e-3,3e-3."),
        ([*SWEEP, "--grid=train.seed"], "--grid must be KEY=VALUE,VALUE,..., e.g. --grid=train.l"),
        ([*SWEEP, "--grid=train.seed=0,0"], "--grid must have each key and value once; got"),
        (
            [*SWEEP, "--grid=train.seed=0,1", "--grid=train.lr=1e-3"],
            "unknown config key 'train.lr'; the nearest is --config.train.",
        ),
        ([*SWEEP, "--grid=train.learning_rate=1e-3,fast"], "'fast'"),
        ([*SWEEP, "--grid=train.learning_rate=1e-3,-1"], "must be above 0; got -1.0"),
        (
            [*SWEEP, "--grid=train.seed=0,1,2", "--index=3"],
            "--index must be below 3, the number of points of the grid; got 3. --list prints them",
        ),
        (["-m", "flowhn_jax.compare", "--size=2b"], "tiny, 135m, 350m, 1b"),
        (["-m", "flowhn_jax.compare", "--size=tiny", "--budget=9"], "--budget must be tokens:N or"),
        (["-m", "flowhn_jax.compare", "--size=tiny", "--rates=fast"], "--rates must be different"),
        (["-m", "flowhn_jax.compare", "--size=tiny", "--models=llama,mambo"], "'mambo'"),
        (
            ["train.py", "--config=configs/baseline_tiny.py:lama", "--workdir=x"],
            "llama, mamba1, mamba2, jamba, shm, hymba, falcon_h1; got 'lama'",
        ),
        (["-m", "flowhn_jax.split", "--config=baseline_tiny:llama"], "'llama'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_one_clear_message(arguments, message):
    run = call(*arguments)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert message in run.stderr
    assert [line[:7] for line in run.stderr.splitlines()][-1] == "error: "
    assert len(run.stderr) < 5000
    assert not (ROOT / "x").exists()


def test_split_table():
    text = succeed("-m", "flowhn_jax.split", "--config=flowhn_135m").stdout
    assert text == succeed("-m", "flowhn_jax", "split", "--config=configs/flowhn_135m.py").stdout
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
    """What the README shows first, with a smaller model and fewer steps."""
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
