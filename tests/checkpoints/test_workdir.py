import pytest

from flowhn_jax.checkpoints import workdir as workdir_lib
from flowhn_jax.split import measured
from flowhn_jax.split.measured import BranchTimes
from tests.small import small_config


@pytest.fixture
def by_time(monkeypatch, tmp_path):
    """Return a config with split.balance 'time', measured as a quarter to attention."""
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    config = small_config("fa_split", split={"balance": "time", "align": 1})
    measured.save("cpu", config.model.dims, BranchTimes((0.0, 3.0, 0.0), (0.0, 1.0)))
    return config


def test_a_run_keeps_its_share_whatever_is_measured_later(by_time, tmp_path, capsys):
    run = str(tmp_path / "run")
    workdir_lib.make(run)
    first = workdir_lib.with_recorded_share(None, by_time)
    assert first.model.split.balance == 0.25
    assert "as measured: 0.2500" in capsys.readouterr().out
    workdir_lib.write_config(run, first)
    measured.save("cpu", by_time.model.dims, BranchTimes((0.0, 1.0, 0.0), (0.0, 3.0)))
    assert workdir_lib.with_recorded_share(run, by_time) == first
    assert f"as in {run}: 0.2500" in capsys.readouterr().out
    workdir_lib.check_model(run, workdir_lib.with_recorded_share(run, by_time))
    assert workdir_lib.with_recorded_share(None, by_time).model.split.balance == 0.75


def test_a_run_with_another_balance_is_another_model(by_time, tmp_path):
    run = str(tmp_path)
    workdir_lib.write_config(run, small_config("fa_split", split={"align": 1}))
    with pytest.raises(ValueError, match=r"model.split.balance: 'flops' -> 0.25"):
        workdir_lib.check_model(run, workdir_lib.with_recorded_share(run, by_time))
