"""The profile of some steps, and the times in a run's rows."""

import pytest
from jax.profiler import ProfileData

from flowhn_jax.bench.device_trace import executions_of, read_trace
from flowhn_jax.config import TrainConfig
from flowhn_jax.training import profiler as profiler_lib
from flowhn_jax.training.metrics import read_rows
from flowhn_jax.training.profiler import Profiler
from flowhn_jax.training.trainer import fit
from tests.profiling import usable_profiler  # noqa: F401
from tests.training.test_trainer import data, run_config  # noqa: F401


def traced_steps(path):
    """Return the numbers of the steps in a trace's annotations."""
    found = []
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found.append(dict(event.stats)["step_num"])
    return sorted(found)


@pytest.mark.usefixtures("usable_profiler")
def test_the_profile_has_the_steps_and_their_operations(data, tmp_path):  # noqa: F811
    fit(run_config(data, steps=6, profile="3:2", log_every=1), str(tmp_path))
    (run,) = (tmp_path / "tensorboard/plugins/profile").iterdir()
    (path,) = run.iterdir()
    assert (run.name, path.name) == ("step_3", "process_0.xplane.pb")
    assert traced_steps(path) == [3, 4]
    modules = {each.module for each in executions_of(read_trace(ProfileData.from_file(str(path))))}
    assert "jit_train_step" in modules


def test_rows_have_the_times_and_the_end_adds_them_up(data, tmp_path, capsys):  # noqa: F811
    fit(run_config(data, steps=4, log_every=1, checkpoint_every=2), str(tmp_path))
    assert "since the start: steps " in capsys.readouterr().out
    rows = read_rows(tmp_path)
    for row in rows:
        assert 0 < row["goodput"] < 1
        assert row["data_wait"] >= 0
    assert [row["checkpoint_seconds"] > 0 for row in rows] == [False, False, True, False]


@pytest.mark.usefixtures("usable_profiler")
def test_a_run_that_ends_among_the_steps_writes_those_it_did(tmp_path):
    with Profiler(range(2, 9), str(tmp_path), print) as profiler:
        for step in (1, 2, 3):
            with profiler.before(step, ()):
                pass
            profiler.after(step, ())
    (path,) = tmp_path.rglob("*.pb")
    assert traced_steps(path) == [2, 3]


def test_a_resume_after_the_steps_profiles_nothing(tmp_path):
    with Profiler(range(2, 4), str(tmp_path), print) as profiler:
        with profiler.before(4, ()):
            pass
        profiler.after(4, ())
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("usable_profiler")
def test_a_profile_that_cannot_be_written_is_logged(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(profiler_lib.place(tmp_path)), "copy_from", full)
    lines = []
    with Profiler(range(1, 2), str(tmp_path), lines.append) as profiler:
        with profiler.before(1, ()):
            pass
        profiler.after(1, ())
    assert lines == ["skipped the profile: No space left on device"]


@pytest.mark.parametrize(
    "value", ["5", "0:2", "3:0", "99:3", "a:b", "5:3:1", "-1:2", "1:" + "9" * 30]
)
def test_a_value_that_names_no_steps_is_refused(value):
    with pytest.raises(ValueError, match=r"train.profile must be START:COUNT, e.g. 5:3 for the"):
        TrainConfig(steps=100, profile=value)


def test_the_last_steps_can_be_profiled():
    assert TrainConfig(steps=100, profile="98:3").profiled_steps == range(98, 101)
