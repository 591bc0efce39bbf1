import dataclasses
import json

import pytest

from flowhn_jax.bench import branch_times
from flowhn_jax.split import measured
from tests.slow import all_but
from tests.small import small_baseline, small_config


@pytest.mark.parametrize("ssm", all_but(["mamba1"], ["mamba1", "mamba2"]))
def test_times_are_measured_fitted_and_saved(monkeypatch, tmp_path, capsys, ssm):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path / "cache"))
    model = {"ssm": ssm, "ssm_head_dim": 8}
    monkeypatch.setattr(branch_times, "_POINTS", 3)
    config = small_config(model=model, split={"stem": 1})
    out = tmp_path / "branches.json"
    times = branch_times.bench_branches(config, repeats=1, out=str(out))
    assert measured.load("cpu", config.model.dims) == times
    document = json.loads(out.read_text())
    assert [row["tokens"] for row in document["rows"]] == [8, 16, 24]
    assert all(row["attention"] > 0 < row["ssm"] for row in document["rows"])
    assert ("ssd xla" if ssm == "mamba2" else "selective_scan") in document["kernels"]
    printed = capsys.readouterr().out
    for line in ("| tokens |", "| flops   |", "| time    |"):
        assert line in printed


def test_a_model_without_branches_is_rejected(tmp_path):
    config = dataclasses.replace(small_config(), model=small_baseline("llama"))
    with pytest.raises(
        ValueError, match=r"model.kind must be 'flowhn' for bench br.*; got 'llama'"
    ):
        branch_times.bench_branches(config, repeats=1, out=str(tmp_path / "out.json"))


def test_branches_that_read_all_tokens_are_rejected(tmp_path):
    config = small_config(split={"reads": "all"})
    with pytest.raises(ValueError, match=r"split.reads must be 'own' for bench br.*; got 'all'"):
        branch_times.bench_branches(config, repeats=1, out=str(tmp_path / "out.json"))
