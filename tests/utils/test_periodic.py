"""Work that a background thread repeats."""

import threading

import pytest

from flowhn_jax.utils.periodic import repeating


def thread_named(name):
    return next((each for each in threading.enumerate() if each.name == name), None)


def test_the_function_is_called_again_until_it_returns_false():
    calls, is_last = [], threading.Event()

    def call():
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            is_last.set()
        return len(calls) < 3

    with repeating(call, 0.001, "counting", joins=True):
        assert is_last.wait(60)
        thread = thread_named("counting")
        if thread is not None:  # it ends on its own
            thread.join(60)
        assert calls == ["counting"] * 3


def test_nothing_is_called_at_once_or_after_the_context():
    """The interval comes first, and an end during it wakes the thread up."""
    calls = []
    with (
        pytest.raises(ZeroDivisionError),
        repeating(lambda: calls.append(1) is None, 3600, "waiting", joins=True),
    ):
        raise ZeroDivisionError
    assert calls == []
    assert thread_named("waiting") is None


@pytest.mark.parametrize("joins", [True, False])
def test_the_end_waits_for_a_call_only_if_asked(joins):
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def call():
        begun.set()
        assert may_end.wait(60)
        ended.set()
        return True

    timer = threading.Timer(0.2, may_end.set)
    with repeating(call, 0.001, "slow", joins=joins):
        assert begun.wait(60)
        if joins:
            timer.start()
    assert ended.is_set() is joins
    may_end.set()
    timer.cancel()
