import dataclasses
import json

import pytest

from flowhn_jax.bench import decode
from flowhn_jax.split import SplitConfig
from tests.small import small_config


def test_caches_and_forward_passes_decode_the_same_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "_NEW_TOKENS", 20)
    config = small_config("fac_split", model={"context": 64, "blocks": 2})
    row = decode.bench_decode(config, repeats=2, out=str(tmp_path / "out.json"))
    assert row["same_tokens"]
    assert row["late_position"] == 48
    assert row["late_over_early"] == pytest.approx(row["late_ms"] / row["early_ms"])
    assert row["speedup"] == pytest.approx(row["recomputed_seconds"] / row["cached_seconds"])
    assert json.loads((tmp_path / "out.json").read_text()) == row
    assert "the same tokens" in capsys.readouterr().out


def test_models_that_cannot_be_measured_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"context must be at least 512 .*; got 24"):
        decode.bench_decode(small_config(), repeats=1, out=str(tmp_path / "out.json"))
    config = small_config(model={"context": 512})
    split = SplitConfig("ae_split", scope="sequence")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, split=split))
    with pytest.raises(ValueError, match=r"split.scope must be 'context' .*; got 'sequence'"):
        decode.bench_decode(config, repeats=1, out=str(tmp_path / "out.json"))
