import json

import pytest

from flowhn_jax.utils import json_text


@pytest.mark.parametrize("depth", [1, 99, 100])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
def test_nested_values_are_read(depth, brackets):
    text = brackets[:-1] * (depth - 1) + ("[]" if brackets == "[]" else "{}")
    text += brackets[-1] * (depth - 1)
    assert json_text.loads(text, "file") == json.loads(text)


@pytest.mark.parametrize("depth", [101, 990, 5_000, 200_000])
def test_values_that_are_nested_too_deeply_are_refused(depth):
    """Whether the parser takes them or not, which depends on Python's version."""
    text = '{"a": [1, ' + "[" * (depth - 2) + "]" * (depth - 2) + "]}"
    with pytest.raises(ValueError, match=r"^file is not JSON: it is nested too deeply\.$"):
        json_text.loads(text, "file")


def test_other_errors_name_their_place():
    with pytest.raises(ValueError, match=r"^file is not JSON: Expecting value: line 1 column 2"):
        json_text.loads("[", "file")
