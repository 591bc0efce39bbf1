import contextlib
import errno
import fcntl
import os
import stat

import pytest

from flowhn_jax.utils.lock import try_lock, wait_for_lock


def test_one_holder_at_a_time_whatever_is_removed_inside(tmp_path):
    with try_lock(tmp_path) as first:
        assert first
        assert list(tmp_path.iterdir()) == []
        with try_lock(tmp_path) as second:
            assert not second
    with try_lock(tmp_path) as again:
        assert again


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_a_file_is_locked_where_folders_cannot_be(tmp_path, monkeypatch, number):
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


@pytest.mark.parametrize("change", ["renamed", "removed", "replaced"])
def test_a_lock_on_a_folder_that_lost_its_name_is_reported(tmp_path, change):
    """The holder renames or removes it while a second process waits."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def when_taken():
        if change == "renamed":
            folder.rename(tmp_path / "other")
        else:
            folder.rmdir()
        if change == "replaced":
            folder.mkdir()
        first.close()

    first = contextlib.ExitStack()
    assert first.enter_context(wait_for_lock(folder, lambda: None))
    with wait_for_lock(folder, when_taken) as has_name:
        assert not has_name


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def failing(descriptor, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="broken"), try_lock(tmp_path):
        pass
