import json
import sys

import pytest

from flowhn_jax.bench import models


def test_both_compute_the_same(monkeypatch, tmp_path, capsys):
    """Equal first losses, and the ratio is that of the times."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(models, "_SIZES", {"vocab_size": 64, "context": 24, "width": 32})
    rows = models.bench_models(repeats=1, out=str(tmp_path / "out.json"))
    assert [row["model"] for row in rows] == ["llama", "mamba1"]
    for row in rows:
        assert row["first_loss"] == pytest.approx(row["peer_first_loss"], abs=2e-4)
        ratio = row["tokens_per_second"] / row["peer_tokens_per_second"]
        assert row["ratio"] == pytest.approx(ratio)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert "mamba1" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install torch transformers"):
        models.bench_models(repeats=1, out=str(tmp_path / "out.json"))
