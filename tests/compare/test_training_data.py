import shutil

import pytest

from flowhn_jax.compare import training_data
from flowhn_jax.compare.training_data import data_path
from flowhn_jax.data.config import DataConfig
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.prepared import PreparedSet

TEXTS = {f"{number}.py": f"value_{number} = {number}\n".encode() * 20 for number in range(40)}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(training_data, "_RECALL_DOCUMENTS", 30)
    monkeypatch.setattr(training_data, "package_documents", lambda: TEXTS)
    monkeypatch.setattr("flowhn_jax.data.packages_corpus.package_documents", lambda: TEXTS)


def test_the_packages_are_prepared_once_with_their_tokenizer(tmp_path, capsys, monkeypatch):
    sizes = dict(context=16, vocab_size=300)
    path = data_path(str(tmp_path), "packages", 0.0, **sizes)
    prepared = PreparedSet.open(path)
    assert 257 < prepared.vocab_size <= 300
    assert sum(split.documents for split in prepared.splits.values()) == 40
    assert "fewer than the 100,000,000 bytes that are wanted" in capsys.readouterr().out
    monkeypatch.setattr(training_data, "package_documents", None)  # packages may change later
    assert data_path(str(tmp_path), "packages", 0.0, **sizes) == path


@pytest.mark.parametrize("corpus", ["given", "packages"])
def test_recall_texts_are_mixed_in(tmp_path, corpus):
    """Both sets have one tokenizer, and each window can hold a whole text."""
    given, sizes = "", dict(context=96, vocab_size=300)
    if corpus == "given":
        shutil.copy(__file__, tmp_path / "text.txt")
        prepare(str(tmp_path / "text.txt"), "bytes", tmp_path / "set", context=96)
        given = str(tmp_path / "set")
    path = data_path(str(tmp_path), corpus, 0.25, given=given, **sizes)
    first, second = DataConfig(path=path).training_sets
    assert [first.name, second.name] == ["corpus", "recall"]
    assert [first.weight, second.weight] == [0.75, 0.25]
    texts, recall = (PreparedSet.open(each.path) for each in (first, second))
    assert recall.tokenizer_fingerprint == texts.tokenizer_fingerprint
    assert sum(split.documents for split in recall.splits.values()) == 30
    split = recall.splits["train"]
    assert 0.5 < split.tokens / split.documents / 48 < 1.3
    assert not (tmp_path / "recall.jsonl").exists()
    assert data_path(str(tmp_path), corpus, 0.25, given=given, **sizes) == path


def test_a_context_that_is_too_short_for_a_question_is_refused(tmp_path):
    shutil.copy(__file__, tmp_path / "text.txt")
    prepare(str(tmp_path / "text.txt"), "bytes", tmp_path / "set", context=48)
    with pytest.raises(ValueError, match="--recall must be 0 for a context of 48 tokens, since"):
        data_path(
            str(tmp_path), "embedded", 0.1, context=48, vocab_size=300, given=str(tmp_path / "set")
        )
