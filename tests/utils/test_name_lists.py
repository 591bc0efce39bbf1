import pytest

from flowhn_jax.utils.name_lists import parse_name_list

KNOWN = ("red", "green", "blue")


def test_names_are_separated_by_commas():
    assert parse_name_list("colors", "green, red", KNOWN) == ("green", "red")
    assert parse_name_list("colors", "all", KNOWN, "all") == KNOWN


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("rad", r"--colors must be all or names from red, green, blue, .*; got 'rad'"),
        ("red,", r"--colors must be .*; got ''"),
        ("red,blue,red", r"--colors must have each name once; got 'red,blue,red'"),
    ],
)
def test_unknown_and_repeated_names_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_name_list("colors", value, KNOWN, "all")


def test_all_is_a_name_like_others_where_nothing_stands_for_all():
    with pytest.raises(ValueError, match=r"--colors must be names from .*; got 'all'"):
        parse_name_list("colors", "all", KNOWN)
