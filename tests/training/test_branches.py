"""Runs that begin at a checkpoint of another run, and schedules and optimizers on a resume."""

import shutil

import jax
import numpy as np
import pytest

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.optimizer import learning_rate_schedule
from flowhn_jax.training.metrics import read_rows
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import data, final_params, rows_without_times, run_config  # noqa: F401
from tools import same_run

SOURCE = dict(steps=8, schedule="constant", keep_every=4, checkpoint_every=4)


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):  # noqa: F811
    """Train eight steps at a constant rate, with checkpoints of steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("runs") / "source"
    fit(run_config(data, **SOURCE), str(workdir))
    return workdir


def branch_of(data, source, step=4, **train):  # noqa: F811
    return run_config(data, **SOURCE | train, branch_from=f"{source}/checkpoints/{step}")


def test_a_branch_with_the_same_recipe_ends_as_its_source(data, source, tmp_path, capsys):  # noqa: F811
    """Parameters, optimizer, data and rows, bit for bit."""
    config = branch_of(data, source)
    fit(config, str(tmp_path))
    assert f"branching from {source} at step 4" in capsys.readouterr().out
    assert workdir_lib.read_config(str(tmp_path)) == config
    found = same_run.differences(tmp_path, source)
    assert found.pop("rows_compared") == 4
    assert not any(found.values())


def test_a_wsd_branch_decays_and_resumes_without_its_source(data, source, tmp_path, capsys):  # noqa: F811
    shutil.copytree(source, tmp_path / "source")
    keys = dict(schedule="wsd", steps=10, cooldown=0.6, final_learning_rate=0.0, log_every=1)
    halfway = branch_of(data, tmp_path / "source", **keys | {"steps": 6})
    whole = branch_of(data, tmp_path / "source", **keys)
    fit(whole, str(tmp_path / "whole"))
    output = capsys.readouterr().out
    assert "changed since the source: train.schedule: 'constant' -> 'wsd'" in output
    assert "the learning rate of step 5" not in output  # step 4 of 10 is where the decay begins
    rates = {row["step"]: row["learning_rate"] for row in read_rows(tmp_path / "whole")}
    schedule = learning_rate_schedule(whole.train)
    for step in range(5, 11):
        assert rates[step] == pytest.approx(float(schedule(step - 1)))
    assert rates[5] == pytest.approx(6 * rates[10])

    fit(halfway, str(tmp_path / "resumed"))
    shutil.rmtree(tmp_path / "source")
    fit(whole, str(tmp_path / "resumed"))
    output = capsys.readouterr().out
    assert "the learning rate of step 7" in output
    assert "the schedule now ends at step 10 with 0 of 0.0003" in output


@pytest.mark.parametrize(
    ("step", "train", "message"),
    [
        (5, {}, r"train.branch_from must be a checkpoint .* holds the steps 4, 8; got .*5'"),
        (8, {}, "train.steps must be above 8, the step of train.branch_from; got 8"),
        (4, {"optimizer": "muon"}, "train.optimizer must be 'adamw', whose state .*; got 'muon'"),
        (4, {"batch_size": 4}, "train.batch_size must be 8, as in the checkpoint; got 4"),
    ],
)
def test_what_cannot_branch(data, source, tmp_path, step, train, message):  # noqa: F811
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fit(branch_of(data, source, step, **train), str(tmp_path))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("value", ["runs/main", "runs/checkpoints/new", "s3://a/checkpoints/3"])
def test_a_source_that_is_no_checkpoint_is_refused(data, value):  # noqa: F811
    with pytest.raises(ValueError, match=r"train.branch_from(: | must be a checkpoint WORKDIR)"):
        run_config(data, branch_from=value)


def test_a_damaged_source_is_refused(data, source, tmp_path):  # noqa: F811
    shutil.copytree(source, tmp_path / "source")
    (file,) = (tmp_path / "source/checkpoints/4/data").glob("*.json")
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"train.branch_from: .* is damaged: data/.* has changed"):
        fit(branch_of(data, tmp_path / "source"), str(tmp_path / "run"))


def test_another_optimizer_is_refused_on_a_resume(data, source):  # noqa: F811
    with pytest.raises(ValueError, match=r"train.optimizer must be .adamw., whose state"):
        fit(run_config(data, **SOURCE | {"steps": 9, "optimizer": "muon"}), str(source))


def test_a_schedule_that_becomes_constant_is_reported(data, source, tmp_path, capsys):  # noqa: F811
    shutil.copytree(source, tmp_path / "run")
    keys = dict(steps=9, learning_rate=1e-3)
    fit(run_config(data, **SOURCE | keys), str(tmp_path / "run"))
    expected = "the learning rate of step 9: 0.0003 -> 0.001; the schedule now stays at 0.001"
    assert expected in capsys.readouterr().out


def test_a_run_with_muon_resumes_bit_for_bit(data, tmp_path):  # noqa: F811
    keys = dict(optimizer="muon", schedule="constant", warmup=0.0, eval_every=6)
    config = run_config(data, steps=6, **keys)
    fit(run_config(data, steps=3, **keys), str(tmp_path / "resumed"))
    fit(config, str(tmp_path / "resumed"))
    fit(config, str(tmp_path / "whole"))
    found, expected = (final_params(tmp_path / name, config) for name in ("resumed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (
        rows_without_times(tmp_path / "whole")[-1] == rows_without_times(tmp_path / "resumed")[-1]
    )
