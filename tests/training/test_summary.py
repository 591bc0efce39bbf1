"""The summary of a run at its end."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import pytest

from flowhn_jax.data.open import open_data
from flowhn_jax.evaluation.generate import Generation
from flowhn_jax.report import plots
from flowhn_jax.training import summary, trainer
from flowhn_jax.training.health.preemption import StopRequest
from flowhn_jax.training.sample import read_sample
from tests.training.test_trainer import data, final_params, run_config, uninterrupted  # noqa: F401


def row(step, **values):
    return {"step": step, "tokens": 100 * step, "step_seconds": 2.0, "loss": 4.0 / step} | values


def summarise(data, workdir, config=None, stop=None):  # noqa: F811
    config = run_config(data) if config is None else config
    summary.print_summary(
        config,
        final_params(workdir, run_config(data)),
        open_data(config, str(workdir)),
        workdir=str(workdir),
        argv=["train.py", f"--workdir={workdir}"],
        stop=StopRequest() if stop is None else stop,
    )


def test_the_result_of_a_run(tmp_path):
    (tmp_path / "checkpoints" / "60").mkdir(parents=True)
    rows = [
        row(20, validation_bits_per_byte=2.5),
        row(40, validation_bits_per_byte=2.25),
        row(50),
        row(60, validation_bits_per_byte=2.3),
    ]
    assert summary.describe_result(rows, str(tmp_path)) == [
        "done: 60 steps, 6,000 tokens in 2:00 of train steps",
        "validation: 2.3000 bits/byte at the end, 2.2500 at best (step 40)",
        f"checkpoint: {tmp_path}/checkpoints/60",
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["train.py", "--config=configs/flowhn_tiny.py", "--config.train.steps=9"],
            [
                "python eval.py --workdir=runs/a --mode=perplexity",
                "python eval.py --workdir=runs/a --mode=generate --prompt=The",
                "python train.py --config=configs/flowhn_tiny.py --config.train.steps=18",
            ],
        ),
        (
            ["/bin/flowhn", "train", "--config.train.steps", "9", "--workdir=runs/a b"],
            [
                "flowhn eval --workdir=runs/a --mode=perplexity",
                "flowhn eval --workdir=runs/a --mode=generate --prompt=The",
                "flowhn train '--workdir=runs/a b' --config.train.steps=18",
            ],
        ),
    ],
)
def test_the_next_commands(argv, expected):
    assert summary.next_commands(argv, "runs/a", 9) == expected


def test_the_summary_adds_the_picture_and_the_sample(data, uninterrupted, capsys):  # noqa: F811
    workdir, expected = uninterrupted
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    summarise(data, workdir)
    out = capsys.readouterr().out
    assert "done: 8 steps, 1,536 tokens in 0:" in out
    assert f"loss curve: {workdir}/loss.png" in out
    assert "sample, after " in out
    assert "\n  | " in out
    assert "--config.train.steps=16" in out.splitlines()[-1]
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert after.pop(workdir / "loss.png").startswith(b"\x89PNG")
    sample = read_sample(workdir)
    assert sample is not None
    assert sample.step == 8
    assert f"sample, after {sample.prompt!r}:" in out
    assert after.pop(workdir / "sample.json")
    assert after == before
    for name in ("loss.png", "sample.json"):
        (workdir / name).unlink()
    jax.tree.map(lambda a, b: None, final_params(workdir, run_config(data)), expected)


def test_a_run_ends_with_its_own_state(data, tmp_path):  # noqa: F811
    found = []
    config = run_config(data, steps=2, eval_every=2)
    fit_args = dict(on_step=lambda: None, on_end=lambda *each: found.append(each))
    assert trainer.fit(config, str(tmp_path), **fit_args)
    ((at_end, params, opened),) = found
    assert at_end == config
    assert opened.main.splits["train"].tokens > 0
    expected = final_params(tmp_path, config)
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("differs"), params, expected)


def test_what_is_not_possible_is_logged(data, uninterrupted, capsys, monkeypatch):  # noqa: F811
    def missing():
        raise ImportError("Drawing needs matplotlib, which is not installed")

    monkeypatch.setattr(plots, "load_pyplot", missing)
    config = run_config(data)
    split = dataclasses.replace(config.model.split, scope="sequence")
    model = dataclasses.replace(config.model, split=split)
    monkeypatch.setattr(summary.models, "can_decode", lambda model: False)
    summarise(data, uninterrupted[0], dataclasses.replace(config, model=model))
    out = capsys.readouterr().out
    assert "skipped the picture: Drawing needs matplotlib, which is not installed\n" in out
    assert "skipped the sample: " in out
    assert "cannot generate token by token" in out
    assert "next:\n" in out


def test_a_signal_ends_the_summary(data, uninterrupted, capsys, monkeypatch):  # noqa: F811
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    def sampled(*args):
        pytest.fail("a sample after the signal")

    monkeypatch.setattr(summary, "_draw", interrupted)
    monkeypatch.setattr(summary, "_print_sample", sampled)
    with StopRequest() as stop:
        summarise(data, uninterrupted[0], stop=stop)
    assert "next:\n" in capsys.readouterr().out


def test_a_sample_prints_nothing_that_a_terminal_interprets(
    data,  # noqa: F811
    uninterrupted,  # noqa: F811
    capsys,
    monkeypatch,
):
    generation = Generation("a\x1b[2J", "b\rc\nd\x07", 3, "length")
    monkeypatch.setattr(summary, "generate", lambda *_, **__: [generation])
    monkeypatch.setattr(summary, "_draw", lambda *_: None)
    summarise(data, uninterrupted[0])
    out = capsys.readouterr().out
    assert "\n  | b\N{REPLACEMENT CHARACTER}c\n  | d\N{REPLACEMENT CHARACTER}\n" in out
    assert "\x1b" not in out


def test_a_run_in_a_pipe_prints_no_carriage_return(data, tmp_path):  # noqa: F811
    command = [sys.executable, "train.py", "--config=configs/flowhn_tiny.py"]
    command += [f"--workdir={tmp_path}", f"--config.data.path={data}", "--config.model.context=24"]
    command += ["--config.model.blocks=1", "--config.model.width=32", "--config.train.steps=2"]
    command += ["--config.train.eval_windows=4", "--config.train.batch_size=4"]
    command += ["--config.model.mlp_width=32"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith(b"flowhn: loading JAX ...\nflowhn-jax ")
    assert b"\ninitialising ...\ncompiling ...\n" in b"\n" + done.stderr
    assert b"\ndone: 2 steps" in done.stdout
