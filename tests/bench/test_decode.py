import dataclasses
import json

import pytest

from flowhn_jax.bench import decode
from flowhn_jax.config import SplitConfig
from tests.small import small_config


def test_both_ways_give_the_same_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "_NEW_TOKENS", 20)
    config = small_config("fac_split", model={"context": 64, "blocks": 2})
    row = decode.bench_decode(config, repeats=2, out=str(tmp_path / "out.json"))
    assert row["same_tokens"]
    assert row["late_position"] == 48
    assert row["late_over_early"] == pytest.approx(row["late_ms"] / row["early_ms"])
    assert row["speedup"] == pytest.approx(row["recomputed_seconds"] / row["cached_seconds"])
    assert json.loads((tmp_path / "out.json").read_text()) == row
    assert "the same tokens" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="context is 24; accepted is 512 or more"):
        decode.bench_decode(small_config(), repeats=1, out=str(tmp_path / "out.json"))
    config = small_config(model={"context": 512})
    split = SplitConfig("ae_split", scope="sequence")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, split=split))
    with pytest.raises(ValueError, match=r"split.scope is .sequence."):
        decode.bench_decode(config, repeats=1, out=str(tmp_path / "out.json"))
