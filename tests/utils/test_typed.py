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
        ({"name": 3}, "name is 3, a int; accepted is str or None"),
        ({"parts": {}}, "parts is {}; accepted is a list"),
        ({"parts": [{"size": 1}, 2]}, r"parts.1 is 2; accepted is a group of keys"),
        ({"parts": [{}]}, r"parts.0.size is missing"),
        ({"groups": [1]}, r"groups is \[1\]; accepted is a group of keys"),
        ({"groups": {"a": {"size": 2**63}}}, r"groups.a.size is 9223372036854775808; .* at most"),
        ({"groups": {"a": {"size": float("nan")}}}, "groups.a.size is nan; .* a finite number"),
        ({"rest": None}, "rest is None; accepted is a group"),
        ({"nam": 1}, "Unknown key 'nam'; the nearest is 'name'"),
        ({"x" * 10**6: 1}, r"Unknown key 'x+\.\.\.x+'; the nearest"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        typed.build(Outer, WHOLE | change, what="key")
    assert len(str(error.value)) < 500
