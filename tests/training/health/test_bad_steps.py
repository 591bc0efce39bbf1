"""Steps without finite numbers, and spikes of the loss."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training import step as step_lib
from flowhn_jax.training.health.monitor import Monitor, RunProgress, TooManySkippedError
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import (  # noqa: F401
    assert_is_the_uninterrupted_run,
    data,
    final_params,
    run_config,
)


@pytest.fixture
def bad_data(data, monkeypatch):  # noqa: F811
    """Make the loss of these steps' batches NaN, whenever a run reaches them."""

    def make(*steps):
        batches = train_batches(PreparedSet.open(data), batch_size=8, seed=0)
        sums = [int(next(batches)["tokens"].sum()) for _ in range(12)]
        batches.close()
        bad = jnp.array([sums[step - 1] for step in steps])
        loss_sum = step_lib.loss_sum

        def with_bad_batches(config, params, batch, **options):
            found = loss_sum(config, params, batch, **options)
            is_bad = jnp.isin(batch["tokens"].sum(), bad)
            return jnp.where(is_bad, jnp.log(-1.0 * is_bad), 1.0) * found

        monkeypatch.setattr(step_lib, "loss_sum", with_bad_batches)

    return make


def steps_of(workdir):
    return [row["step"] for row in metrics_lib.read_rows(str(workdir))]


def test_a_bad_step_changes_nothing_and_is_counted(data, bad_data, tmp_path, capsys):  # noqa: F811
    bad_data(2)
    config = run_config(data, steps=2, log_every=1, checkpoint_every=1)
    fit(config, str(tmp_path))
    rows = metrics_lib.read_rows(str(tmp_path))
    assert [row["skipped"] for row in rows] == [0, 1]
    assert rows[1]["loss"] is None
    assert rows[1]["validation_loss"] > 0
    assert "step 2 was skipped: loss nan, gradient norm nan" in capsys.readouterr().out
    mesh = make_mesh(config.mesh, 8)
    before, after = (load_params(str(tmp_path), config.model, mesh, step) for step in ("1", "2"))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    # The learning rate is that of an optimizer after one step, also in a run that resumes.
    longer = run_config(data, steps=4, log_every=1, checkpoint_every=1)
    fit(longer, str(tmp_path))
    row = metrics_lib.read_rows(str(tmp_path))[2]
    assert row["skipped"] == 1
    assert row["learning_rate"] == pytest.approx(
        float(step_lib.learning_rate_schedule(longer.train)(1))
    )


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_with_what_to_debug(data, bad_data, tmp_path):  # noqa: F811
    bad_data(5, 6, 7)
    config = run_config(data, max_skipped=3, log_every=1)
    with pytest.raises(ValueError, match=r"last 3 steps up to 7 had no finite loss") as raised:
        fit(config, str(tmp_path))
    assert str(tmp_path / "debug") in str(raised.value)
    assert "--config.train.rewinds=1" in str(raised.value)
    batches = train_batches(PreparedSet.open(data), batch_size=8, seed=0)
    assert json.loads((tmp_path / "debug" / "bad_batches.json").read_text()) == [
        {"step": step, "windows": batches.windows_of(step - 1)} for step in (5, 6, 7)
    ]
    # The folder is a workdir, whose next step is the first bad one.
    assert [p.name for p in (tmp_path / "debug" / "checkpoints").iterdir()] == ["4"]
    found = run_config(data, max_skipped=3, log_every=1, debug_nans=True)
    with pytest.raises(FloatingPointError, match="log"):  # the operation that made the first NaN
        fit(found, str(tmp_path / "debug"))


def test_windows_of_a_batch_are_its_windows(data):  # noqa: F811
    prepared = PreparedSet.open(data)
    batches = train_batches(prepared, batch_size=8, seed=3)
    windows = prepared.windows("train")
    for number in range(2 * len(windows) // 8):
        batch = next(batches)
        expected = [windows[index]["tokens"] for index in batches.windows_of(number)]
        np.testing.assert_array_equal(batch["tokens"], expected)
    batches.close()


def test_rewinds_and_skips_the_bad_data(data, bad_data, tmp_path, capsys):  # noqa: F811
    """The run rewinds to step 3, because the checkpoint of step 6 is between bad steps."""
    bad_data(5, 6, 7)
    config = run_config(data, max_skipped=3, rewinds=1, log_every=1)
    fit(config, str(tmp_path))
    assert "continuing from step 3 with the data after them" in capsys.readouterr().out
    assert steps_of(tmp_path) == list(range(1, 9))
    rows = metrics_lib.read_rows(str(tmp_path))
    assert all(row["loss"] is not None and row["skipped"] == 0 for row in rows)
    # A run that resumes here continues with the data after the skipped ones.
    state = pathlib.Path(tmp_path / "checkpoints" / "8" / "data" / "batches.json").read_text()
    assert json.loads(state)["step"] == 8 + 4


def test_rewinds_at_most_as_often_as_the_config_says(data, bad_data, tmp_path):  # noqa: F811
    bad_data(5, 6, 7, 8, 9, 10)
    config = run_config(data, max_skipped=3, rewinds=1)
    with pytest.raises(ValueError, match=r"--config.train.rewinds=2"):
        fit(config, str(tmp_path))


def observe(losses, max_skipped=3):
    lines, progress = [], RunProgress()
    monitor = Monitor(progress, max_skipped, lines.append)
    for step, loss in enumerate(losses, 1):
        finite = bool(np.isfinite(loss))
        in_row = 0 if finite else in_row + 1  # noqa: F821
        monitor.observe(step, {"loss": loss, "grad_norm": loss, "skipped_in_row": in_row})
    return lines, progress


def test_a_spike_is_logged_and_counted(rng):
    losses = 4 - np.linspace(0, 1, 200) + 0.05 * rng.standard_normal(200)
    assert observe(losses)[1].spikes == 0
    losses[150] += 1.5
    lines, progress = observe(losses)
    assert progress.spikes == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"step 151: the loss of {losses[150]:.4f} is a spike;")


def test_too_many_are_counted_in_a_row():
    skipped = [1.0, float("nan"), float("inf")]
    lines, _ = observe(skipped * 3)
    assert lines[0] == "step 2 was skipped: loss nan, gradient norm nan"
    assert len(lines) == 6
    with pytest.raises(TooManySkippedError, match="last 3 steps up to 6"):
        observe([1.0, 1.0, 1.0, *[float("nan")] * 3])
