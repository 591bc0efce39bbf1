import json

import pytest

from flowhn_jax import storage
from flowhn_jax.bench import checkpoint_cost
from tests.small import small_config


def test_segments_with_and_without_a_save_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_cost, "_STEPS", 3)
    config = small_config("fac_split", mesh={"data": 1})
    row = checkpoint_cost.bench_checkpoint(config, repeats=2, out=str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == row
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert row["steps"] == 3
    assert 0 < row["seconds_in_save"] < row["seconds_with"]
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["ratio"] == pytest.approx((row["ratio_min"] + row["ratio_max"]) / 2)
    assert f"{row['ratio']:.4f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_save_to_a_bucket_is_timed_next_to_a_local_one(bucket, monkeypatch):
    monkeypatch.setattr(checkpoint_cost, "_STEPS", 3)
    config = small_config("fac_split", mesh={"data": 1})
    out = storage.place(bucket) / "out.json"
    row = checkpoint_cost.bench_checkpoint(config, repeats=2, out=str(out))
    assert json.loads(out.read()) == row
    assert [name for name, _ in out.parent.walk()] == ["out.json"]
    assert 0 < row["seconds_in_save_local"] < row["seconds_with_local"]
    assert row["ratio_to_local"] > 0
