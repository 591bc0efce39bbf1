import pytest

from tools.growth import failures, measure_growth
from tools.small_run import small_config


@pytest.mark.slow
def test_files_and_threads_do_not_grow(tmp_path):
    growth = measure_growth(tmp_path, small_config(""), 200)
    assert growth["steps"] == 200
    assert not {"files", "threads"} & set(failures(growth)), growth
    assert growth["memory_growth"] < 0.1, growth


def test_failures_names_what_grew():
    same = {"memory_growth": 0.0099}
    for name in ("files", "threads"):
        same |= {f"{name}_before": 10, f"{name}_after": 10}
    assert failures(same) == []
    assert failures(same | {"memory_growth": 0.01, "threads_after": 10.5}) == ["memory", "threads"]


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--steps must be at least 100; got 99"):
        measure_growth(tmp_path, small_config(""), 99)
