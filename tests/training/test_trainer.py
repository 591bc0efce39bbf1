import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import flops, models
from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.checkpoints.optimizer import learning_rate_schedule
from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.config import MeshConfig
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import console as console_lib
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training import trainer
from flowhn_jax.training.trainer import fit
from tests.small import small_config

STEPS = 8


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepare a few kilobytes of text."""
    folder = tmp_path_factory.mktemp("data")
    text = pathlib.Path(__file__).parent.parent / "data" / "wikitext.txt"
    shutil.copy(text, folder / "text.txt")
    prepare(str(folder / "text.txt"), "bytes", str(folder / "set"), context=24)
    return str(folder / "set")


def run_config(data, **train):
    cadence = {"log_every": 2, "eval_every": 4, "checkpoint_every": 3, "eval_windows": 8}
    return small_config(
        "fac_split",
        model={"blocks": 1},
        train={"steps": STEPS, **cadence, **train},
        data={"path": data},
        mesh={"data": 1},
    )


def final_params(workdir, config):
    mesh = make_mesh(config.mesh, config.train.batch_size)
    return jax.device_get(load_params(str(workdir), config.model, mesh))


def rows_without_times(workdir):
    timed = ("second", "mfu", "time", "data_wait", "goodput")
    return [
        {name: value for name, value in row.items() if not any(part in name for part in timed)}
        for row in metrics_lib.read_rows(str(workdir))
    ]


def signalling_console(number):
    """Return a Console that sends the signal to its own process after the second step."""

    class Signalling(console_lib.Console):
        steps = 0

        def count_step(self):
            super().count_step()
            self.steps += 1
            if self.steps == 2:
                os.kill(os.getpid(), number)

    return Signalling


def train_whole(config, tmp_path_factory):
    """Return the workdir and the last parameters of a run without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    fit(config, str(workdir))
    return workdir, final_params(workdir, config)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return train_whole(run_config(data), tmp_path_factory)


def assert_is_the_uninterrupted_run(workdir, config, uninterrupted):
    expected_workdir, expected = uninterrupted
    params = final_params(workdir, config)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert rows_without_times(workdir) == rows_without_times(expected_workdir)


def test_the_workdir_holds_what_is_documented(data, uninterrupted):
    workdir, _ = uninterrupted
    assert workdir_lib.read_config(str(workdir)) == run_config(data)
    rows = metrics_lib.read_rows(str(workdir))
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    keys = (
        "step loss grad_norm learning_rate tokens tokens_per_second tokens_per_second_per_device "
        "tflops_per_second_per_device mfu step_seconds"
    )
    for row in rows:
        assert set(keys.split()) <= set(row)
        assert row["mfu"] is None
        assert row["tokens"] == row["step"] * 8 * 24
        assert row["tokens_per_second"] == pytest.approx(8 * 24 / row["step_seconds"])
    assert [row["step"] for row in rows if "validation_bits_per_byte" in row] == [4, 8]
    assert any((workdir / "tensorboard").iterdir())
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 8]


@pytest.mark.slow
def test_eight_devices_end_where_one_does(data, uninterrupted, tmp_path):
    """Started on eight devices and continued on one, a run has the same data and model."""
    config = run_config(data)
    eight = dataclasses.replace(config, mesh=MeshConfig(data=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Console", signalling_console(signal.SIGTERM))
        fit(eight, str(tmp_path))
    fit(config, str(tmp_path))
    rows, expected = (metrics_lib.read_rows(str(w)) for w in (tmp_path, uninterrupted[0]))
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        final_params(tmp_path, config),
        uninterrupted[1],
    )


def test_loss_falls(data, tmp_path):
    config = run_config(data, steps=40, learning_rate=1e-2, log_every=40, eval_every=40)
    fit(config, str(tmp_path))
    (row,) = metrics_lib.read_rows(str(tmp_path))
    assert row["validation_loss"] < 0.9 * np.log(257)


def test_starting_again_after_the_end_changes_nothing(data, uninterrupted, capsys):
    workdir, _ = uninterrupted
    fit(run_config(data), str(workdir))
    output = capsys.readouterr().out
    assert "is at step 8, and train.steps is 8: nothing to train" in output
    assert_is_the_uninterrupted_run(workdir, run_config(data), uninterrupted)


def test_fewer_steps_than_are_done_change_nothing_in_the_workdir(
    data, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    fit(run_config(data, steps=5), str(tmp_path / "run"))
    output = capsys.readouterr().out
    assert "is at step 8, and train.steps is 5: nothing to train" in output
    assert "--config.train.steps=16" in output
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    after.pop(tmp_path / "run" / "lock"), before.pop(tmp_path / "run" / "lock")
    assert after == before


def test_a_schedule_that_changes_on_a_resume_is_reported(data, uninterrupted, tmp_path, capsys):
    """Of 8 steps the ninth has the final rate; of 16 it is in the middle of the cosine."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    config = run_config(data, steps=16)
    fit(config, str(tmp_path / "run"))
    output = capsys.readouterr().out
    old, new = (
        float(learning_rate_schedule(run_config(data, steps=steps).train)(8)) for steps in (8, 16)
    )
    assert new > 2 * old
    assert f"the learning rate of step 9: {old:.3g} -> {new:.3g}" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_the_run_resumes(
    data, uninterrupted, tmp_path, capsys, number, monkeypatch
):
    config = run_config(data)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Console", signalling_console(number))
        fit(config, str(tmp_path))
    assert f"stopped by {number.name} at step 2" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    fit(config, str(tmp_path))
    assert f"resuming {tmp_path} at step 2" in capsys.readouterr().out
    assert_is_the_uninterrupted_run(tmp_path, config, uninterrupted)


def test_a_rounded_mean_of_gradients_is_resumed_bit_for_bit(data, tmp_path, monkeypatch):
    config = run_config(data, steps=4, moment_dtype="bfloat16")
    fit(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Console", signalling_console(signal.SIGTERM))
        fit(config, str(tmp_path / "resumed"))
    fit(config, str(tmp_path / "resumed"))
    whole = tmp_path / "whole", final_params(tmp_path / "whole", config)
    assert_is_the_uninterrupted_run(tmp_path / "resumed", config, whole)


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "bfloat16"),
        pytest.param(("bfloat16", "float32"), marks=pytest.mark.slow),
    ],
)
def test_the_mean_of_gradients_may_change_its_dtype_on_a_resume(data, tmp_path, capsys, dtypes):
    before, after = dtypes
    fit(run_config(data, steps=2, log_every=1, moment_dtype=before), str(tmp_path))
    fit(run_config(data, steps=3, log_every=1, moment_dtype=after), str(tmp_path))
    assert f"train.moment_dtype: '{before}' -> '{after}'" in capsys.readouterr().out
    assert [row["step"] for row in metrics_lib.read_rows(str(tmp_path))] == [1, 2, 3]


def test_killed_anywhere_the_run_resumes_bit_for_bit(data, uninterrupted, tmp_path):
    """After kill -9 the rows since the last checkpoint are dropped, and their steps repeated."""
    config = run_config(data)
    script = (
        "import sys, json, os\n"
        "from flowhn_jax import config as config_lib\n"
        "from flowhn_jax.training import metrics, trainer\n"
        "class Dying(metrics.MetricsWriter):\n"
        "    def write(self, row):\n"
        "        super().write(row)\n"
        "        if row['step'] == 4: os.kill(os.getpid(), 9)\n"
        "metrics.MetricsWriter = Dying\n"
        "trainer.fit(config_lib.parse(json.loads(sys.argv[1])), sys.argv[2])\n"
    )
    text = json.dumps(config_lib.to_dict(config))
    command = [sys.executable, "-c", script, text, str(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in metrics_lib.read_rows(str(tmp_path))] == [2, 4]
    fit(config, str(tmp_path))
    assert_is_the_uninterrupted_run(tmp_path, config, uninterrupted)


def test_data_damaged_under_a_running_job(data, tmp_path, monkeypatch):
    """The run ends with an error and keeps its work; with undamaged data it continues."""
    damaged = tmp_path / "set"
    shutil.copytree(data, damaged)
    config = run_config(str(damaged), steps=40, log_every=1, eval_every=40, checkpoint_every=100)
    shard = damaged / PreparedSet.open(damaged).splits["train"].shards[0].file
    whole = shard.read_bytes()

    class Damaging(metrics_lib.MetricsWriter):
        def write(self, row):
            super().write(row)
            if row["step"] == 2:  # in place, as the file is open; some batches are read already
                with shard.open("r+b") as file:
                    file.write(bytes(len(whole)))

    with monkeypatch.context() as patch:
        patch.setattr(metrics_lib, "MetricsWriter", Damaging)
        with pytest.raises(ValueError, match=r"Window \d+ of the train split in .*set is damaged"):
            fit(config, str(tmp_path / "run"))
    (saved,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 2 <= saved < 40
    shard.write_bytes(whole)
    fit(config, str(tmp_path / "run"))
    fit(config, str(tmp_path / "whole"))
    expected = tmp_path / "whole", final_params(tmp_path / "whole", config)
    assert_is_the_uninterrupted_run(tmp_path / "run", config, expected)


def test_another_model_in_the_workdir_is_refused(data, uninterrupted):
    workdir, _ = uninterrupted
    other = small_config("fai_split", model={"blocks": 1}, data={"path": data})
    with pytest.raises(ValueError, match=r"model.split.strategy: 'fac_split' -> 'fai_split'"):
        fit(other, str(workdir))


def test_other_data_in_the_workdir_is_refused(data, uninterrupted):
    workdir, _ = uninterrupted
    other = small_config("fac_split", model={"blocks": 1}, data={"path": data, "seed": 1})
    with pytest.raises(ValueError, match=r"data.seed must be 0, as in the checkpoint; got 1"):
        fit(other, str(workdir))


def test_another_batch_size_is_refused_and_the_run_unchanged(data, uninterrupted):
    workdir, _ = uninterrupted
    other = run_config(data, steps=STEPS + 1, batch_size=4)
    with pytest.raises(ValueError, match=r"train.batch_size must be 8, as .*; got 4"):
        fit(other, str(workdir))
    assert_is_the_uninterrupted_run(workdir, run_config(data), uninterrupted)
    assert workdir_lib.read_config(str(workdir)) == run_config(data)


def test_a_changed_recipe_is_accepted_and_logged(data, tmp_path, capsys):
    config = run_config(data, steps=2, log_every=1)
    fit(config, str(tmp_path))
    longer = run_config(data, steps=3, log_every=1)
    fit(longer, str(tmp_path))
    assert "changed since the last run: train.steps: 2 -> 3" in capsys.readouterr().out
    assert [row["step"] for row in metrics_lib.read_rows(str(tmp_path))] == [1, 2, 3]
    assert workdir_lib.read_config(str(tmp_path)) == longer


def test_data_of_another_context_or_vocabulary_is_refused(data, tmp_path):
    for model, message in (
        ({"context": 32}, "a context of 24 tokens, but model.context is 32"),
        (
            {"vocab_size": 100},
            r"vocab_size must be at least 257, .* got 100\. .*--config\.model\.vocab_size=384$",
        ),
    ):
        config = small_config("fac_split", model=model, data={"path": data}, mesh={"data": 1})
        with pytest.raises(ValueError, match=message):
            fit(config, str(tmp_path / next(iter(model))))


def test_workdir_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--workdir must be a folder; .*file' is a file"):
        fit(run_config(data), str(tmp_path / "file"))


def test_logged_flops_are_those_of_the_plan(data, uninterrupted):
    workdir, _ = uninterrupted
    model = run_config(data).model
    for row in metrics_lib.read_rows(str(workdir)):
        expected = 8 * flops.train_flops(model, 24) / row["step_seconds"] / 1e12
        assert row["tflops_per_second_per_device"] == pytest.approx(expected)
    assert models.param_count(model) > 0
