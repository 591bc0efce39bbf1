import dataclasses
from typing import Any

import pytest

from flowhn_jax.utils import typed


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str | None
    parts: tuple[Inner, ...]
    groups: dict[str, Inner]
    rest: dict[str, Any]


WHOLE = {
    "name": None,
    "parts": [{"size": 1}, {"size": 2.0, "share": 1}],
    "groups": {"a": {"size": 3}},
    "rest": {"b": [1, {}]},
}


def test_values_become_dataclasses():
    parts = Inner(1), Inner(2, 1.0)
    expected = Outer(None, parts, {"a": Inner(3)}, {"b": [1, {}]})
    assert typed.build(Outer, WHOLE, what="key") == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, r"name must be str or None; got 3 \(int\)\."),
        ({"parts": {}}, r"parts must be a list; got \{\}\."),
        ({"parts": [{"size": 1}, 2]}, r"parts\.1 must be a group of keys; got 2\."),
        ({"parts": [{}]}, r"parts\.0\.size must be given"),
        ({"groups": [1]}, r"groups must be a group of keys; got \[1\]\."),
        ({"groups": {"a": {"size": 2**63}}}, r"a\.size must be at most 9223372036854775807; got"),
        (
            {"groups": {"a": {"size": -(2**63)}}},
            r"a\.size must be at least -9223372036854775807",
        ),
        ({"groups": {"a": {"size": float("nan")}}}, r"a\.size must be a finite number; got nan\."),
        ({"rest": None}, r"rest must be a group of keys; got None\."),
        ({"nam": 1}, "unknown key 'nam'; the nearest is 'name'"),
        ({"x" * 10**6: 1}, r"unknown key 'x+\.\.\.x+'; the nearest"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        typed.build(Outer, WHOLE | change, what="key")
    assert len(str(error.value)) < 500
