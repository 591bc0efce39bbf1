import json
import pathlib

import pytest

from flowhn_jax.data.prepare import prepare

DATA = pathlib.Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def tokenizer_json():
    """Return the path of a byte-level BPE of 512 tokens."""
    return DATA / "tokenizer.json"


@pytest.fixture(scope="session")
def paragraphs():
    """Return about 30 paragraphs of real text, with characters of one to three bytes."""
    text = (DATA / "wikitext.txt").read_text() + "\nÆgir är en jätte — 海の巨人。\n"
    return [line.strip() for line in text.splitlines() if line.strip()] * 2


@pytest.fixture
def jsonl(tmp_path, paragraphs):
    """Return the path of the paragraphs as a .jsonl file."""
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in paragraphs))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, paragraphs):
    """Return a set of the paragraphs as bytes: context 32, at least two validation documents."""
    folder = tmp_path_factory.mktemp("prepared")
    path = folder / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return prepare(str(path), "bytes", folder / "set", context=32, validation_fraction=0.1)
