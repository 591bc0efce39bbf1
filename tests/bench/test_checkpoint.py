import json

import pytest

from flowhn_jax.bench import checkpoint
from tests.small import small_config


def test_both_kinds_of_segments_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "_STEPS", 3)
    config = small_config("fac_split", mesh={"data": 1})
    row = checkpoint.bench_checkpoint(config, repeats=2, out=str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == row
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert row["steps"] == 3
    assert 0 < row["seconds_in_save"] < row["seconds_with"]
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["ratio"] == pytest.approx((row["ratio_min"] + row["ratio_max"]) / 2)
    assert f"ratio {row['ratio']:.4f}" in capsys.readouterr().out
