import json
import sys

import pytest

from flowhn_jax.bench import peer_models


def test_both_have_the_same_first_loss(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(peer_models, "_SIZES", {"vocab_size": 64, "context": 24, "width": 32})
    rows = peer_models.bench_models(repeats=1, out=str(tmp_path / "out.json"))
    assert [row["model"] for row in rows] == ["llama", "mamba1"]
    for row in rows:
        assert row["first_loss"] == pytest.approx(row["peer_first_loss"], abs=2e-4)
        ratio = row["tokens_per_second"] / row["peer_tokens_per_second"]
        assert row["ratio"] == pytest.approx(ratio)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert "mamba1" in capsys.readouterr().out


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install torch transformers"):
        peer_models.bench_models(repeats=1, out=str(tmp_path / "out.json"))
