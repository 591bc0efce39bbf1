import os
import stat

import pytest

from flowhn_jax.utils.files import sync_tree, whole_file, write_atomically


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    """A library that writes the file may choose another one, as safetensors does."""
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert (tmp_path / "target").read_text() == "mine"


def test_a_text_and_bytes_are_written_whole(tmp_path):
    write_atomically(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    write_atomically(tmp_path / "a", b"\xff")
    assert (tmp_path / "a").read_bytes() == b"\xff"


def write_half(path):
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError


def test_an_error_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError):
        write_half(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(*names):
        events.append("renamed")
        replace(*names)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", renamed)
    with whole_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert events == ["a.tmp", "renamed", tmp_path.name]
    del events[:]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("y")
    sync_tree(tmp_path)
    assert sorted(events) == sorted(["a", "c", "b", tmp_path.name])
