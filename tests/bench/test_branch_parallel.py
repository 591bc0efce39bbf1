import dataclasses
import json

import jax
import pytest

from flowhn_jax.bench.branch_parallel import bench_parallel
from flowhn_jax.split import measured
from flowhn_jax.split.measured import BranchTimes
from tests.small import small_baseline, small_config


@pytest.mark.slow
def test_one_and_two_devices_compute_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    config = small_config()
    measured.save("cpu", config.model.dims, BranchTimes((0.0, 1.0, 0.0), (0.0, 3.0)))
    rows = bench_parallel(config, repeats=2, out=str(tmp_path / "out.json"))
    assert [row["balance"] for row in rows] == ["equal", "flops", "time"]
    assert [row["attention_tokens"] for row in rows][::2] == [12, 18]
    for row in rows:
        assert 0 < row["largest_difference"] < 1e-4
        ratio = row["one_device_seconds"] / row["two_devices_seconds"]
        assert row["ratio"] == pytest.approx(ratio)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert "| balance | attention's tokens |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_balance_by_time_needs_branches_that_read_their_own_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    config = small_config(split={"reads": "all"})
    measured.save("cpu", config.model.dims, BranchTimes((0.0, 1.0, 0.0), (0.0, 3.0)))
    rows = bench_parallel(config, repeats=1, out=str(tmp_path / "out.json"))
    assert [row["balance"] for row in rows] == ["equal", "flops"]


def test_models_and_machines_that_cannot_be_measured_are_rejected(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"must be one that splits tokens.*; got 'no_split'"):
        bench_parallel(small_config("no_split"), repeats=1, out=str(tmp_path / "out.json"))
    baseline = dataclasses.replace(small_config(), model=small_baseline("llama"))
    with pytest.raises(
        ValueError, match=r"model.kind must be 'flowhn' for bench pa.*; got 'llama'"
    ):
        bench_parallel(baseline, repeats=1, out=str(tmp_path / "out.json"))
    monkeypatch.setattr(jax, "devices", lambda: [None])
    with pytest.raises(ValueError, match="needs two devices; found 1"):
        bench_parallel(small_config(), repeats=1, out=str(tmp_path / "out.json"))
