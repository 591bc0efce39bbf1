"""Files around other files."""

import io

from flowhn_jax.utils.wrapped_file import WrappedFile


def test_closing_closes_both():
    inner = io.BytesIO(b"abc")
    with io.BufferedReader(WrappedFile(inner)) as outer:
        assert outer.read() == b"abc"
        assert not inner.closed
    assert inner.closed
