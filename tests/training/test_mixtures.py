"""Runs on several sets: rows, best checkpoints, resuming and evaluation."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.parameters import find_step
from flowhn_jax.data.open import open_data, open_tokenizer
from flowhn_jax.data.prepare import prepare
from flowhn_jax.evaluation import evaluate as evaluation
from flowhn_jax.evaluation import perplexity
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training import trainer
from flowhn_jax.training.console import describe
from flowhn_jax.training.events import tags
from flowhn_jax.training.trainer import fit
from tests.command_line import ROOT
from tests.training.test_processes import fit_in_two_processes
from tests.training.test_trainer import (
    assert_is_the_uninterrupted_run,
    run_config,
    signalling_console,
    train_whole,
)
from tools.reference import METRICS, OPTIONAL_METRICS

NAMES = ("wiki", "reversed", "other")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Prepare three small texts, and return the folders."""
    folder = tmp_path_factory.mktemp("sets")
    text = (ROOT / "tests/data/wikitext.txt").read_text()
    texts = (text[:3000], text[3000:4200][::-1], text[4200:])
    for name, each in zip(NAMES, texts, strict=True):
        (folder / f"{name}.txt").write_text(each)
        source = str(folder / f"{name}.txt")
        prepare(source, "bytes", folder / name, context=24, validation_fraction=0.1)
    return folder


def mixture_config(folder, **train):
    config = run_config("", **train)
    path = f"{folder}/wiki:0.7,{folder}/reversed:0.3"
    data = dataclasses.replace(config.data, path=path, validation=f"{folder}/other")
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def uninterrupted(sets, tmp_path_factory):
    return train_whole(mixture_config(sets), tmp_path_factory)


def test_rows_hold_each_set(sets, uninterrupted):
    rows = metrics_lib.read_rows(str(uninterrupted[0]))
    forms = {key for key, _ in OPTIONAL_METRICS if "NAME" in key}
    known = {key.replace("NAME", name) for key in forms for name in NAMES} - {"epochs/other"}
    assert {key for row in rows for key in row} == {key for key, _ in METRICS} | known
    data = open_data(mixture_config(sets), "unused")
    windows = [each.prepared.splits["train"].windows for each in data.training]
    for row in rows:
        epochs = [row[f"epochs/{name}"] for name in NAMES[:2]]
        counts = np.multiply(epochs, windows)
        np.testing.assert_allclose(counts, 8 * row["step"] * np.array([0.7, 0.3]), atol=1)
    row = rows[-1]
    assert tags(row)["validation/loss/wiki"] == row["validation_loss/wiki"]
    mean = 0.7 * row["validation_loss/wiki"] + 0.3 * row["validation_loss/reversed"]
    assert row["validation_loss"] == pytest.approx(mean)
    # A target of these sets is a byte, except for the end of each document.
    assert row["validation_bits_per_byte"] == pytest.approx(mean / np.log(2), rel=0.05)


def test_the_line_of_a_row_names_the_sets():
    row = {"step": 4, "loss": 1.5, "tokens_per_second": 10.0, "mfu": None, "step_seconds": 1.0}
    assert "(" not in describe(row, 4)
    row |= {"epochs/wiki": 1.25, "epochs/code": 0.5}
    assert describe(row, 4).endswith("  epochs (wiki 1.25, code 0.5)")
    row |= {"validation_bits_per_byte": 2.0, "validation_bits_per_byte/wiki": 1.75}
    row |= {"validation_bits_per_byte/code": 2.5}
    assert "  validation 2.0000 bits/byte (wiki 1.7500, code 2.5000)  epochs" in describe(row, 4)


def test_a_set_is_validated_as_if_it_were_alone(sets, uninterrupted):
    workdir, params = uninterrupted
    config = mixture_config(sets)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    eval_step = perplexity.make_eval_step(config)
    row = metrics_lib.read_rows(str(workdir))[-1]
    for name, prepared in open_data(config, str(workdir)).named.items():
        with jax.set_mesh(mesh):
            found = perplexity.validate(config, mesh, eval_step, params, prepared, 8)
        assert row[f"validation_loss/{name}"] == pytest.approx(found.nll, rel=1e-6)
        assert row[f"validation_bits_per_byte/{name}"] == pytest.approx(found.bits_per_byte)


def test_an_interrupted_run_continues(sets, uninterrupted, tmp_path):
    config = mixture_config(sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Console", signalling_console(signal.SIGTERM))
        assert not fit(config, str(tmp_path))
    assert fit(config, str(tmp_path))
    assert_is_the_uninterrupted_run(tmp_path, config, uninterrupted)


@pytest.mark.slow
def test_two_processes_have_the_same_data(sets, uninterrupted, tmp_path):
    config = mixture_config(sets)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=8))
    printed = fit_in_two_processes(config, tmp_path)
    assert "70 % of the windows, " in "".join(printed[0])
    rows, expected = (metrics_lib.read_rows(str(each)) for each in (tmp_path, uninterrupted[0]))
    for row, wanted in zip(rows, expected, strict=True):
        for key in wanted:
            if key.startswith(("loss", "validation", "epochs")):
                assert row[key] == pytest.approx(wanted[key], rel=1e-4), key


@pytest.mark.parametrize("change", ["weights", "single", "sets"])
def test_another_mixture_is_not_resumed(sets, uninterrupted, change):
    workdir, _ = uninterrupted
    config = mixture_config(sets, steps=9)
    path = {
        "weights": config.data.path.replace("0.7", "0.6"),
        "single": f"{sets}/wiki",
        "sets": f"{sets}/wiki:0.7,{sets}/other:0.3",
    }[change]
    data = dataclasses.replace(config.data, path=path, validation="")
    config = dataclasses.replace(config, data=data)
    message = "data.path must name the data that the checkpoint was trained on"
    if change == "weights":
        message = r"the weights in data.path must be \[0.7, 0.3\].*; got \[0.66"
    with pytest.raises(ValueError, match=message):
        fit(config, str(workdir))


def test_the_best_checkpoint_is_that_of_the_named_set(sets, tmp_path, monkeypatch):
    """The losses of the sets are lowest after different steps."""
    losses = {"wiki": [3.0, 1.0, 2.0, 4.0], "reversed": [4.0, 3.0, 1.0, 2.0]}
    losses["other"] = [1.0, 2.0, 3.0, 4.0]
    counts = dict.fromkeys(NAMES, 0)
    config = mixture_config(sets, steps=4, eval_every=1, checkpoint_every=1, keep_checkpoints=4)
    workdir = str(tmp_path)

    def score(self, prepared, params, should_stop):
        name = prepared.folder.name
        counts[name] += 1
        return perplexity.Quality(losses[name][counts[name] - 1], 10, 10)

    monkeypatch.setattr(trainer.Validator, "_score_set", score)
    fit(config, workdir)
    for best_by, expected in (("other", 1), ("wiki", 2), ("", 2), ("reversed", 3)):
        train = dataclasses.replace(config.train, best_by=best_by, keep_checkpoints=1)
        changed = dataclasses.replace(config, train=train)
        workdir_lib.write_config(workdir, changed)
        assert find_step(workdir, "best") == expected
    with Checkpoints(workdir, changed) as checkpoints:
        checkpoints._prune()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_eval_scores_each_set(sets, uninterrupted, capsys):
    workdir, _ = uninterrupted
    capsys.readouterr()
    evaluation.evaluate(None, str(workdir), "perplexity")
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert list(result["sets"]) == list(NAMES)
    assert any(line.startswith("| wiki") for line in lines)
    mean = 0.7 * result["sets"]["wiki"]["nll"] + 0.3 * result["sets"]["reversed"]["nll"]
    assert result["nll"] == pytest.approx(mean)
    for name in NAMES:  # as if it were the only one
        evaluation.evaluate(None, str(workdir), "perplexity", data=f"{sets}/{name}")
        alone = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["sets"][name] == {key: alone[key] for key in result["sets"][name]}
    with pytest.raises(ValueError, match="--by_position needs --data, the set to score, for exa"):
        evaluation.evaluate(None, str(workdir), "perplexity", by_position=True)
    assert open_tokenizer(mixture_config(sets), str(workdir)).spec == "bytes"
    evaluation.evaluate(None, str(workdir), "generate", prompt="The", max_new_tokens=3)
