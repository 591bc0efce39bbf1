"""The points of a grid and their folders."""

import pytest

from flowhn_jax.sweep.grid import parse_axes, points


def test_all_combinations_have_readable_folders():
    axes = parse_axes(["train.learning_rate=1e-3, 3e-3", "train.seed=0,1"])
    assert axes == {"train.learning_rate": ("1e-3", "3e-3"), "train.seed": ("0", "1")}
    found = points(axes)
    assert [point.name for point in found] == [
        "learning_rate=1e-3_seed=0",
        "learning_rate=1e-3_seed=1",
        "learning_rate=3e-3_seed=0",
        "learning_rate=3e-3_seed=1",
    ]
    assert found[2].values == {"train.learning_rate": "3e-3", "train.seed": "0"}


def test_keys_with_one_last_part_are_named_in_full():
    (first, *_) = points(parse_axes(["train.seed=0", "data.seed=1,2"]))
    assert first.name == "train.seed=0_data.seed=1"


def test_a_path_is_one_folder():
    (point,) = points(parse_axes(["data.path=gs://bucket/a b/set"]))
    assert point.name == "path=gs-bucket-a-b-set"


def test_values_whose_folders_would_be_one_are_refused():
    with pytest.raises(ValueError, match="a folder of its own; two combinations give 'path=a-b'"):
        points(parse_axes(["data.path=a/b,a:b"]))


@pytest.mark.parametrize("text", ["", "train.seed", "train.seed=", "=1", "train.seed=1,,2"])
def test_malformed_grids(text):
    with pytest.raises(ValueError, match=r"^--grid must be KEY=VALUE,VALUE"):
        parse_axes([text])
