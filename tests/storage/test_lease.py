"""The lock of a run in a bucket: held by one, renewed, lost, taken over after a minute."""

import json
import os
import re
import socket
import threading

import pytest

from flowhn_jax import storage
from flowhn_jax.storage.errors import StorageError
from flowhn_jax.storage.lease import (
    SECONDS_TO_LIVE,
    SECONDS_TO_RENEW,
    InUseError,
    Lease,
    LockLostError,
    held,
)
from tests.storage.emulator import used
from tools.faults import FaultyStore


class Clock:
    """A clock that only `sleep` moves, and that starts when an object of now has this age."""

    def __init__(self, age=0.0):
        import time

        self.now, self.pauses, self.on_sleep = time.time() + age, 0, lambda: None

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses += 1
        self.on_sleep()


def after_reading(lease, action, reads=1):
    """Let `action` happen after this many reads of the object, before the lease acts upon them."""
    found = lease._found

    def read():
        nonlocal reads
        result, reads = found(), reads - 1
        if reads == 0:
            action()
        return result

    lease._found = read


def holder(bucket):
    return json.loads((storage.place(bucket) / "lock").read())


def lease_at(bucket, clock, log=lambda text: None):
    return Lease(storage.place(bucket) / "lock", log, clock=clock, sleep=clock.sleep)


def test_a_lock_is_held_by_one_and_free_after_its_release(bucket):
    clock = Clock()
    first = lease_at(bucket, clock)
    first.acquire()
    clock.on_sleep = lambda: clock.pauses == 3 and first.renew()
    expected = f"process {os.getpid()} on host {socket.gethostname()}"
    with pytest.raises(InUseError, match=rf"^{re.escape(expected)}$"):
        lease_at(bucket, clock).acquire()
    assert clock.pauses == 3  # the second one waited for the renewal
    assert first.error() is None
    first.release()
    assert not (storage.place(bucket) / "lock").exists()
    before = clock.now
    lease_at(bucket, clock).acquire()
    assert clock.now == before


def test_a_dead_lock_is_taken_over_after_a_minute(bucket):
    clock, lines = Clock(), []
    dead = lease_at(bucket, clock)
    dead.acquire()
    begun = clock.now
    second = lease_at(bucket, clock, lines.append)
    second.acquire()
    # The object's age is that of the store's clock, which differs from this one's by a moment.
    assert begun + SECONDS_TO_LIVE - 3 <= clock.now <= begun + SECONDS_TO_LIVE + 3
    assert clock.pauses >= SECONDS_TO_LIVE / 5  # it looks every few seconds
    assert "was renewed 0 s ago; waiting for its next renewal" in lines[0]
    assert "was not renewed; taken over" in lines[1]
    dead.renew()
    assert isinstance(dead.error(), LockLostError)
    assert "taken over by process" in str(dead.error())
    with pytest.raises(LockLostError):
        dead.confirm()
    dead.release()  # not its own any more
    assert holder(bucket)["token"] == second._token
    second.renew()
    assert second.error() is None


def test_a_lock_that_is_renewed_in_time_is_never_taken_over(bucket):
    clock = Clock()
    first = lease_at(bucket, clock)
    first.acquire()
    renewed = clock.now

    def renew_in_time():
        nonlocal renewed
        if clock.now - renewed >= SECONDS_TO_RENEW:
            renewed = clock.now
            first.renew()

    clock.on_sleep = renew_in_time
    with pytest.raises(InUseError):
        lease_at(bucket, clock).acquire()
    assert first.error() is None


def test_a_lock_that_is_released_while_another_reads_it_is_taken(bucket):
    clock = Clock()
    first, second = lease_at(bucket, clock), lease_at(bucket, clock)
    first.acquire()
    after_reading(second, first.release)
    second.acquire()
    assert holder(bucket)["token"] == second._token


def test_of_two_that_take_a_dead_lock_over_one_gets_it(bucket):
    """The other one waits for it, here until it is released."""
    lease_at(bucket, Clock()).acquire()
    clock = Clock(age=SECONDS_TO_LIVE + 5)
    second, third = lease_at(bucket, clock), lease_at(bucket, clock)
    after_reading(second, third.acquire, reads=2)  # the first one tells whose lock it is
    clock.on_sleep = third.release
    second.acquire()
    assert holder(bucket)["token"] == second._token


def test_a_renewal_that_waited_for_the_release_does_not_undo_it(bucket):
    lease = lease_at(bucket, Clock())
    lease.acquire()
    lease.release()
    lease.renew()
    assert lease.error() is None
    assert not (storage.place(bucket) / "lock").exists()


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_a_release_that_comes_too_late_is_none(bucket, monkeypatch, how):
    from google.api_core.exceptions import PreconditionFailed

    blob = type(storage.place(bucket).blob())
    delete = blob.delete

    def delete_as_the_store_does(self, *, if_generation_match=None, **options):
        """Delete the object of this generation; the emulator deletes one of any."""
        self.reload()
        if if_generation_match not in (None, self.generation):
            raise PreconditionFailed("conditionNotMet")
        delete(self, **options)

    first, clock = lease_at(bucket, Clock()), Clock(age=SECONDS_TO_LIVE + 5)
    first.acquire()
    second = lease_at(bucket, clock)
    file = storage.place(bucket) / "lock"
    after_reading(first, second.acquire if how == "taken over" else file.remove)
    monkeypatch.setattr(blob, "delete", delete_as_the_store_does)
    first.release()
    assert file.exists() == (how == "taken over")


def test_an_old_lock_is_taken_over_at_once(bucket):
    lease_at(bucket, Clock()).acquire()
    later = Clock(age=SECONDS_TO_LIVE + 5)
    lease_at(bucket, later).acquire()
    assert later.pauses == 0


def test_a_removed_lock_is_made_again_or_lost_to_another(bucket):
    clock = Clock()
    first, file = lease_at(bucket, clock), storage.place(bucket) / "lock"
    first.acquire()
    file.remove()
    first.renew()
    assert first.error() is None
    assert file.exists()
    file.remove()
    second = lease_at(bucket, clock)
    second.acquire()
    first.renew()
    assert isinstance(first.error(), LockLostError)
    assert second.error() is None
    second.release()
    first.renew()  # lost for good
    assert not file.exists()


def test_an_answer_that_got_lost_is_no_other_holder(bucket):
    clock = Clock()
    lease = lease_at(bucket, clock)
    lease.acquire()
    lease._generation -= 1  # as if the last renewal's answer had not come
    lease.renew()
    assert lease.error() is None
    clock.now += 5
    lease.renew()
    assert holder(bucket)["time"] == clock.now


MALFORMED = [b"", b"{", b"[1]", b'{"pid": "x"}', b'{"pid": [1]}', b'{"pid": 1e999, "host": "x"}']


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_lock_is_another_process(bucket, content):
    (storage.place(bucket) / "lock").write_whole(content)
    clock = Clock()
    clock.on_sleep = lambda: (storage.place(bucket) / "lock").write_whole(content)
    with pytest.raises(InUseError, match="another process"):
        lease_at(bucket, clock).acquire()


def test_a_name_in_a_message_has_a_limit(bucket):
    content = json.dumps({"pid": 1, "host": "x" * 10_000}).encode()
    file, clock = storage.place(bucket) / "lock", Clock()
    file.write_whole(content)
    clock.on_sleep = lambda: file.write_whole(content)
    with pytest.raises(InUseError, match=r"^process 1 on host x{10,300}$"):
        lease_at(bucket, clock).acquire()


def test_confirming_renews_only_what_is_old(bucket):
    clock = Clock()
    lease, file = lease_at(bucket, clock), storage.place(bucket) / "lock"
    lease.acquire()
    before = file.read()
    clock.now += SECONDS_TO_RENEW
    lease.confirm()
    assert file.read() == before
    clock.now += SECONDS_TO_RENEW
    lease.confirm()
    assert json.loads(file.read())["time"] == clock.now


def test_an_outage_is_not_a_loss(emulator, bucket, monkeypatch, capfd):
    monkeypatch.setattr("flowhn_jax.storage.lease._SECONDS_TO_TRY", 0.2)
    with FaultyStore(emulator) as store, used(store.url):
        clock = Clock()
        lease = lease_at(bucket, clock)
        lease.acquire()
        store.refuse(503)
        clock.now += 2 * SECONDS_TO_RENEW
        with pytest.raises(StorageError, match="503"):
            lease.confirm()
        assert lease.error() is None
        store.serve()
        lease.confirm()
        assert lease.error() is None
        store.refuse(503)
        lease.release()  # without an answer the lock expires by itself


def test_a_held_lock_is_renewed_in_the_background(bucket, monkeypatch):
    monkeypatch.setattr("flowhn_jax.storage.lease.SECONDS_TO_RENEW", 0.05)
    file = storage.place(bucket) / "lock"
    renewed = threading.Event()
    write = Lease.renew
    outages = iter([True])

    def renew(self):
        if next(outages, False):
            raise StorageError("no answer")  # it is renewed later
        write(self)
        renewed.set()

    monkeypatch.setattr(Lease, "renew", renew)
    with held(file, print) as lease:
        before = json.loads(file.read())["time"]
        assert renewed.wait(60)
        assert json.loads(file.read())["time"] > before
        assert lease.error() is None
    assert not file.exists()
    assert all(thread.name != "lock" or not thread.is_alive() for thread in threading.enumerate())


def test_a_lost_lock_is_not_renewed_any_more(bucket, monkeypatch):
    monkeypatch.setattr("flowhn_jax.storage.lease.SECONDS_TO_RENEW", 0.05)
    file = storage.place(bucket) / "lock"
    with held(file, print) as lease:
        thread = next(each for each in threading.enumerate() if each.name == "lock")
        file.write('{"token": "of another process"}')
        thread.join(60)
        assert not thread.is_alive()
        assert isinstance(lease.error(), LockLostError)


def test_a_dead_lock_that_vanishes_while_it_is_taken_over(bucket, monkeypatch):
    """The write to its generation is answered with 404; the lock is then made like a new one."""
    file, clock = storage.place(bucket) / "lock", Clock()
    lease_at(bucket, clock).acquire()
    clock.now += 2 * SECONDS_TO_LIVE
    lease = lease_at(bucket, clock)
    request, writes = Lease._request, []

    def vanishing(self, doing, action):
        if doing == "writing":
            writes.append(action)
            if len(writes) == 2:  # the first one is refused, since there is a lock
                file.remove()
                raise FileNotFoundError
        return request(self, doing, action)

    monkeypatch.setattr(Lease, "_request", vanishing)
    lease.acquire()
    assert len(writes) == 3
    assert lease.error() is None
    assert json.loads(file.read())["time"] == clock.now


def test_a_bucket_that_does_not_exist(bucket):
    with pytest.raises(FileNotFoundError, match="gs://absent/run/lock"):
        Lease(storage.place("gs://absent/run/lock"), print).acquire()
