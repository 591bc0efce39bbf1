import pytest

from flowhn_jax.bench.suite import document
from tests.bench.suite import fake_parts


@pytest.fixture
def log_of_parts(tmp_path, monkeypatch):
    """Return the file in which fake parts record what they measure.

    The hash of the code is constant, because files may change while the tests run.
    """
    monkeypatch.setattr(document, "code_hash", lambda: fake_parts.CODE)
    path = tmp_path / "measured.txt"
    monkeypatch.setenv(fake_parts.VARIABLE, str(path))
    return path
