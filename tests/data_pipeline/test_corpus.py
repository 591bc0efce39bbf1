import ast
import pathlib
import shutil
import sysconfig

import pytest

from flowhn_jax.data import corpus


def test_size_and_determinism():
    documents = corpus.embedded_documents()
    size = sum(map(len, documents.values()))
    assert 5e6 < size < 20e6
    assert len(documents) > 300
    assert list(documents) == sorted(documents)
    again = corpus.embedded_documents()
    assert again == documents
    assert corpus.describe(again) == corpus.describe(documents)
    assert f"{size} bytes" in corpus.describe(documents)


def test_documents_are_text_and_include_the_library():
    documents = corpus.embedded_documents()
    for name in ("argparse.py", "json/decoder.py", "asyncio/tasks.py", "pydoc_data/topics.py:if"):
        assert len(documents[name].decode()) > 500
    assert b'The "if" statement' in documents["pydoc_data/topics.py:if"]
    assert all(text for text in documents.values())
    skipped = {"test", "tests", "encodings", "site-packages", "dist-packages"}
    assert not any(skipped.intersection(name.split("/")) for name in documents)
    for name, text in documents.items():
        if name.endswith(".py"):
            ast.parse(text.decode(), name)


def test_the_description_depends_on_names_and_content():
    documents = {"a.py": b"one", "b.py": b"two"}
    known = corpus.describe(documents)
    assert corpus.describe(documents | {"b.py": b"twp"}) != known
    assert corpus.describe({"a.py": b"one", "c.py": b"two"}) != known
    assert corpus.describe({"a.py": b"onet", "b.py": b"wo"}) != known


def test_an_incomplete_standard_library(tmp_path, monkeypatch):
    """Some operating systems ship a Python without parts of its library."""
    for name in ("os.py", "json/decoder.py", "test/regrtest.py"):
        original = pathlib.Path(sysconfig.get_path("stdlib"), name)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if original.exists():
            shutil.copy(original, tmp_path / name)
        else:
            (tmp_path / name).write_text("pass\n")
    (tmp_path / "dist-packages").mkdir()
    (tmp_path / "dist-packages" / "installed.py").write_text("pass\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(corpus.embedded_documents()) == ["json/decoder.py", "os.py"]
    shutil.rmtree(tmp_path / "json")
    (tmp_path / "os.py").unlink()
    with pytest.raises(FileNotFoundError, match="standard library"):
        corpus.embedded_documents()
