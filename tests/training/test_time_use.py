"""What the wall time of a run goes to, by a clock that the test sets."""

import json
import types

import pytest

from flowhn_jax.data import lookahead
from flowhn_jax.training.time_use import Activity, TimeUse


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_each_moment_counts_for_one_activity(clock):
    """Of 20 seconds: 4 before the steps, 8 in them, 1 of it for data, 3 and 5 for the others."""
    use = TimeUse(clock)
    clock.now += 2
    with use.spent_on(Activity.COMPILING):
        clock.now += 2
    with use.spent_on(Activity.STEPS):
        clock.now += 5
        use.count_step(waited=0.75)
        with use.spent_on(Activity.VALIDATION):
            clock.now += 3
        with use.spent_on(Activity.CHECKPOINTS):
            clock.now += 5
        clock.now += 3
        use.count_step(waited=0.25)
        row = use.row()
    assert row == {"data_wait": 0.5, "checkpoint_seconds": 5.0, "goodput": 7 / 20}
    assert json.dumps(row)
    assert use.describe() == (
        "0:20 since the start: steps 35.0%, compiling 10.0%, waiting for data 5.0%, "
        "checkpoints 25.0%, validation 15.0%, other 10.0%"
    )


def test_a_row_counts_from_the_row_before_and_goodput_from_the_start(clock):
    use = TimeUse(clock)
    with use.spent_on(Activity.STEPS):
        clock.now += 4
        use.count_step(waited=1.0)
        use.row()
        with use.spent_on(Activity.CHECKPOINTS):
            clock.now += 4
        clock.now += 2
        for waited in (0.5, 0.25):
            use.count_step(waited)
        row = use.row()
    assert row == {"data_wait": 0.375, "checkpoint_seconds": 4.0, "goodput": (6 - 1.75) / 10}


def test_data_are_late_if_the_last_step_waited(clock):
    use = TimeUse(clock)
    assert not use.data_are_late
    for waited, is_late in ((0.5, True), (1e-5, False)):
        use.count_step(waited)
        assert use.data_are_late is is_late


def test_an_error_ends_an_activity(clock):
    use = TimeUse(clock)

    def fail():
        with use.spent_on(Activity.CHECKPOINTS):
            clock.now += 1
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        fail()
    clock.now += 1
    assert "checkpoints 50.0%" in use.describe()
    assert "other 50.0%" in use.describe()


def test_the_wait_for_each_item_counts_once(clock, monkeypatch):
    """Each item takes 2 seconds, however far ahead it is read."""
    monkeypatch.setattr(lookahead, "time", types.SimpleNamespace(perf_counter=clock))

    def slow():
        for item in range(4):
            clock.now += 2
            yield item

    items = lookahead.Lookahead(slow())
    assert items.error_within(2) is None
    assert items.pop_waited() == 4
    assert [next(items), next(items)] == [0, 1]
    assert items.pop_waited() == 0
    assert next(items) == 2
    assert items.pop_waited() == 2
