import errno
import fcntl
import os
import stat

import pytest

from flowhn_jax.folder_lock import try_lock


def test_one_holder_at_a_time_whatever_is_removed_inside(tmp_path):
    with try_lock(tmp_path) as first:
        assert first
        assert list(tmp_path.iterdir()) == []
        with try_lock(tmp_path) as second:
            assert not second
    with try_lock(tmp_path) as again:
        assert again


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_where_folders_cannot_be_locked_a_file_in_it_is(tmp_path, monkeypatch, number):
    flock = fcntl.flock

    def of_files_alone(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files_alone)
    with try_lock(tmp_path) as first, try_lock(tmp_path) as second:
        assert first
        assert not second
    with try_lock(tmp_path) as again:
        assert again


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def failing(descriptor, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="broken"), try_lock(tmp_path):
        pass
