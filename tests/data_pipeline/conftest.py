import json
import pathlib

import pytest

from flowhn_jax.data.prepare import prepare

DATA = pathlib.Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def tokenizer_json():
    """Path of a byte-level BPE of 512 tokens."""
    return DATA / "tokenizer.json"


@pytest.fixture(scope="session")
def paragraphs():
    """Real text, in about 30 documents with characters of one to three bytes."""
    text = (DATA / "wikitext.txt").read_text() + "\nÆgir är en jätte — 海の巨人。\n"
    return [line.strip() for line in text.splitlines() if line.strip()] * 2


@pytest.fixture
def jsonl(tmp_path, paragraphs):
    """The paragraphs as a .jsonl file."""
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in paragraphs))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, paragraphs):
    """A set of the paragraphs: bytes, context 32, two validation documents and more."""
    folder = tmp_path_factory.mktemp("prepared")
    path = folder / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return prepare(str(path), "bytes", folder / "set", context=32, validation_fraction=0.1)
