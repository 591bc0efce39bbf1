"""A save that fails in one process; tests/training/test_one_fails.py has two."""

import asyncio
import errno

import pytest
from orbax.checkpoint._src import asyncio_utils

from flowhn_jax.checkpoints import saving
from flowhn_jax.data.lookahead import Lookahead
from flowhn_jax.parallel.distributed import FailedElsewhereError


def test_what_a_failed_save_has_begun_ends_before_its_event_loop():
    ended = []

    async def write(seconds, error=None):
        await asyncio.sleep(seconds)
        ended.append(seconds)
        if error is not None:
            raise error

    async def write_all():
        await asyncio.gather(write(0, OSError("full")), write(0.05), write(0.1, OSError("too")))

    with pytest.raises(OSError, match="full"):
        asyncio_utils.run_sync(write_all())
    assert ended == [0, 0.05, 0.1]


@pytest.mark.parametrize(
    ("error", "is_error"),
    [(OSError(errno.ENOSPC, "full"), False), (OSError(errno.EIO, "broken"), True)],
)
def test_only_what_is_no_full_disk_is_an_error(error, is_error):
    def work():
        raise error

    save = saving.Save(0)
    save.start(work)
    save.wait()
    assert save.failure() is error
    assert save.may_succeed_later() == (not is_error)
    assert save.error() is (error if is_error else None)


def test_a_full_disk_of_another_process_is_no_error_either():
    def work():
        save._meeting.fail("later")
        raise FailedElsewhereError

    save = saving.Save(0)
    save.start(work)
    save.wait()
    assert isinstance(save.failure(), FailedElsewhereError)
    assert save.error() is None


def failing_after(count):
    yield from range(count)
    raise ValueError("damaged")


def test_an_error_is_known_before_the_items_in_front_of_it_are_taken():
    ahead = Lookahead(failing_after(3))
    assert ahead.error_within(3) is None
    assert str(ahead.error_within(4)) == "damaged"
    assert ahead.error_within(3) is None
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            next(ahead)


def test_the_end_of_the_items_is_no_error():
    ahead = Lookahead(iter(range(2)))
    assert ahead.error_within(5) is None
    assert list(ahead) == [0, 1]


def test_after_a_change_of_position_the_items_are_read_again():
    position = iter(range(10))
    ahead = Lookahead(position)
    ahead.error_within(3)
    ahead.clear()
    assert next(ahead) == 3
