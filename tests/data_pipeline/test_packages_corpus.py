import sysconfig

import pytest

from flowhn_jax.data import packages_corpus
from flowhn_jax.data.bpe import EOT_TOKEN, train_bpe
from flowhn_jax.data.packages_corpus import package_documents
from flowhn_jax.data.sources import open_source
from flowhn_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return the folder that takes the place of the installed packages."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_each_text_is_there_once(installed):
    write(installed, b__two_py="x = 1\n", a__one_py="x = 1\n", a__three_py="y = 2\n")
    write(
        installed, a__empty_py="", a__latin_py=b"\xff = 1", a__data="z = 3", __pycache____a_py="u"
    )
    assert package_documents() == {"a/one.py": b"x = 1\n", "a/three.py": b"y = 2\n"}


def test_a_part_is_a_sample_and_does_not_depend_on_names(installed, monkeypatch):
    """The order is that of the contents, and the size is limited."""
    texts = {f"a__{letter}_py": letter * 10 for letter in "abcdefgh"}
    write(installed, **texts)
    everything = list(package_documents().values())
    assert len(everything) == 8
    assert everything != sorted(everything)
    assert list(package_documents(35).values()) == everything[:3]
    for path in installed.rglob("*.py"):
        path.rename(path.with_name(f"z{path.name}"))
    assert list(package_documents().values()) == everything
    monkeypatch.setattr(packages_corpus, "_MAX_FILE_BYTES", 9)
    with pytest.raises(FileNotFoundError, match=r"there are none in .*; prepare another --source"):
        package_documents()


def test_packages_are_a_source(installed):
    write(installed, a__one_py="x = 1\n", b__two_py="y = 2\n")
    source = open_source("packages")
    documents = {each.name: each.text for each in source.read(lambda size: None)}
    assert documents == package_documents()
    assert source.size == 12
    assert "packages corpus" in source.identity
    write(installed, b__two_py="y = 3\n")
    assert open_source("packages").identity != source.identity


def test_a_trained_tokenizer(tmp_path):
    texts = [b"def one(two):\n    return two\n"] * 20
    path = tmp_path / "tokenizer.json"
    path.write_text(train_bpe(texts, 300))
    tokenizer = load_tokenizer(str(path))
    assert 257 < tokenizer.vocab_size <= 300
    assert tokenizer.eot_token == EOT_TOKEN
    assert tokenizer.decode(tokenizer.encode("é\x00 def one")) == "é\x00 def one"
    assert len(tokenizer.encode("return two")) < 6
    assert train_bpe(texts, 300) == path.read_text()
    with pytest.raises(ValueError, match="must be at least 257 tokens; got 256"):
        train_bpe(texts, 256)
