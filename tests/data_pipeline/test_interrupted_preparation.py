"""Preparations that are killed, run out of disk space, or run at the same time."""

import errno
import fcntl
import os
import stat
import subprocess
import sys

import pytest
from read_back import ENVIRONMENT, content

from flowhn_jax.data import encoding
from flowhn_jax.data.prepare import parts, prepare
from flowhn_jax.data.prepared import PreparedSet
from flowhn_jax.data.staging import publish, staging_folder
from flowhn_jax.utils.lock import try_lock

# Runs a preparation that kills itself on the COUNT-th call of OWNER.FUNCTION.
KILLED = """
import os, signal, sys
from flowhn_jax.data import encoding, shards, staging
from flowhn_jax.data.prepare import parts, preparation

encoding.GROUP_BYTES = 500
shards.SHARD_BYTES = 20_000

def killed(owner, name, count):
    function, calls = getattr(owner, name), []
    def call(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    setattr(owner, name, call)

if __name__ == "__main__":
    source, out, overwrite, workers, where, count = sys.argv[1:]
    owner, name = where.rsplit(".", 1)
    killed(eval(owner), name, int(count))
    options = dict(context=32, workers=int(workers), overwrite=bool(overwrite))
    preparation.prepare(source, "bytes", out, **options)
"""

# Runs the command with two workers, one of which ends in its third part.
DYING = """
import os, sys
from flowhn_jax.commands import prepare
from flowhn_jax.data import encoding
from flowhn_jax.data.prepare import parts

encoding.GROUP_BYTES = 500
encode, calls = parts.encode, []

def dying(tokenizer, group):
    calls.append(group)
    if len(calls) == 3:
        os._exit(1)
    return encode(tokenizer, group)

parts.encode = dying  # in each worker, too, which imports this file

if __name__ == "__main__":
    source, out = sys.argv[1:]
    prepare.run(
        [f"--source={source}", f"--out={out}", "--tokenizer=bytes", "--context=32", "--workers=2"]
    )
"""

RENAMED = "staging.pathlib.Path.rename"
PARTS = ".set.parts-0-of-1"


def run_killed(tmp_path, source, where, count, *, overwrite="", workers=1):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    arguments = [str(source), str(tmp_path / "set"), overwrite, str(workers), where, str(count)]
    # This would time out if workers outlived their parent, as they hold its output open.
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, timeout=60, env=ENVIRONMENT
    )
    script.unlink()
    assert done.returncode == -9, done.stderr.decode()


@pytest.fixture
def expected(tmp_path, jsonl):
    """Return the files of an uninterrupted preparation."""
    prepare(str(jsonl), "bytes", tmp_path / "expected", context=32)
    return content(tmp_path / "expected")


@pytest.mark.parametrize(
    ("where", "count", "workers"),
    [
        ("parts.encode", 4, 1),
        ("parts.Throughput.end", 4, 3),
        ("parts.whole_file", 4, 1),
        ("parts.write_atomically", 2, 1),
        ("shards.ShardWriter.write", 3, 1),
        ("shards.ShardWriter.close", 2, 1),
        ("preparation.write_splits", 1, 3),
        ("preparation.PreparedSet.write_index", 1, 1),
        ("preparation.publish", 1, 1),
        (RENAMED, 1, 1),
    ],
)
def test_killed_before_the_end(tmp_path, jsonl, expected, monkeypatch, where, count, workers):
    run_killed(tmp_path, jsonl, where, count, workers=workers)
    assert not (tmp_path / "set").exists()
    kept = {path.name for path in (tmp_path / PARTS).glob("*.npz")}
    assert len(kept) >= 3
    made, write_part = [], parts._write_part

    def count_part(tokenizer, group, path):
        made.append(path.name)
        write_part(tokenizer, group, path)

    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)
    monkeypatch.setattr(parts, "_write_part", count_part)
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert not kept & set(made)  # only what was missing
    assert len(kept | set(made)) > 10
    assert content(tmp_path / "set") == expected
    assert not list(tmp_path.glob(".*"))


def test_parts_of_a_source_that_changed_are_not_used(tmp_path, jsonl, monkeypatch):
    run_killed(tmp_path, jsonl, "parts.encode", 4)
    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)
    lines = jsonl.read_text().splitlines(keepends=True)
    jsonl.write_text("".join(reversed(lines)))
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    prepare(str(jsonl), "bytes", tmp_path / "expected", context=32)
    assert content(tmp_path / "set") == content(tmp_path / "expected")


def test_parts_of_other_groups_are_not_used(tmp_path, jsonl, expected):
    """As after an upgrade that divides the text in another way."""
    run_killed(tmp_path, jsonl, "parts.encode", 4)
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert content(tmp_path / "set") == expected


@pytest.mark.parametrize("damage", ["truncated", "removed", "not complete"])
def test_damaged_parts_give_one_message_and_are_made_again(tmp_path, jsonl, expected, damage):
    run_killed(tmp_path, jsonl, "preparation.write_splits", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "GROUP_BYTES", 500)
        part = tmp_path / PARTS / "00000002.npz"
        if damage == "not complete":
            (tmp_path / PARTS / "complete.json").write_text("[]")
        elif damage == "removed":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes()[:300])
        if damage != "not complete":
            with pytest.raises(
                ValueError, match=r"00000002\.npz is missing or damaged \(.*\); rem"
            ):
                prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
        prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert content(tmp_path / "set") == expected
    assert not list(tmp_path.glob(".*"))


def test_a_worker_that_dies_gives_one_message_and_the_same_command_continues(
    tmp_path, jsonl, expected, monkeypatch
):
    """One of two workers ends while it encodes; what was complete is kept."""
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    arguments = [sys.executable, str(script), str(jsonl), str(tmp_path / "set")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    script.unlink()
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "One of the 2 worker processes was killed" in done.stderr
    assert "type the same command to continue" in done.stderr
    assert list((tmp_path / PARTS).glob("*.npz"))
    monkeypatch.setattr(encoding, "GROUP_BYTES", 500)
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert content(tmp_path / "set") == expected
    assert not list(tmp_path.glob(".*"))


def test_killed_after_the_rename(tmp_path, jsonl):
    run_killed(tmp_path, jsonl, "staging.sync", 2)  # the second call is for the parent folder
    made = PreparedSet.open(tmp_path / "set")
    made.verify()
    assert prepare(str(jsonl), "bytes", tmp_path / "set", context=32) == made


@pytest.mark.parametrize("count", [1, 2])
def test_killed_while_replacing_a_set(tmp_path, jsonl, expected, count):
    """Killed before the old set is renamed, and between that and the renaming of the new one."""
    old = prepare(str(jsonl), "bytes", tmp_path / "set", context=16)
    run_killed(tmp_path, jsonl, RENAMED, count, overwrite="yes")
    if count == 1:
        assert PreparedSet.open(tmp_path / "set") == old
    else:
        assert not (tmp_path / "set").exists()
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32, overwrite=True)
    assert content(tmp_path / "set") == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("completes", [True, False])
def test_a_file_system_that_cannot_lock_folders(tmp_path, monkeypatch, completes):
    """The lock is on a file in the folder instead, which is removed afterwards."""
    flock = fcntl.flock

    def flock_files_only(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "only files")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_files_only)
    with staging_folder(tmp_path / "set") as folder:
        (folder / "file").write_text("content")
        with try_lock(folder) as is_free:
            assert not is_free
        if completes:
            publish(folder, tmp_path / "set")
    assert [path.name for path in tmp_path.rglob("*")] == (["set", "file"] if completes else [])


@pytest.mark.parametrize("completes", [True, False])
def test_two_preparations_at_the_same_time(tmp_path, jsonl, expected, completes):
    """The second waits for the first, and uses what it has published."""
    command = [sys.executable, "-m", "flowhn_jax.data.prepare", "--tokenizer=bytes", "--context=32"]
    command += [f"--source={jsonl}", f"--out={tmp_path / 'set'}"]
    with staging_folder(tmp_path / "set") as folder:
        second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert "Waiting for another process" in second.stderr.readline()
        for name, raw in expected.items():
            (folder / name).write_bytes(raw)
        if completes:
            publish(folder, tmp_path / "set")
    stderr = second.communicate()[1]
    assert second.returncode == 0, stderr
    assert ("already prepared" in stderr) == completes
    assert content(tmp_path / "set") == expected
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("link", ["folder", "dangling", "lock", "shard", "pipe"])
def test_links_are_not_followed(tmp_path, jsonl, link):
    """Otherwise files outside would be removed or overwritten."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("not yours")
    folder = tmp_path / ".set.unfinished"
    if link in ("folder", "dangling"):
        folder.symlink_to(outside if link == "folder" else tmp_path / "nowhere")
    else:
        folder.mkdir()
        if link == "pipe":  # opening it for writing would wait for a reader
            os.mkfifo(folder / "lock")
        else:
            name = "lock" if link == "lock" else "train-00000.array_record"
            (folder / name).symlink_to(outside / "precious")
    with pytest.raises(ValueError, match=r"\.set\.unfinished.* was not created by this program"):
        prepare(str(jsonl), "bytes", tmp_path / "set", context=32)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "not yours"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_with_the_name_of_the_replaced_set_is_removed(tmp_path, jsonl):
    (tmp_path / "outside").mkdir()
    prepare(str(jsonl), "bytes", tmp_path / "set", context=16)
    (tmp_path / ".set.replaced").symlink_to(tmp_path / "outside")
    prepare(str(jsonl), "bytes", tmp_path / "set", context=32, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "set", "source.jsonl"]


def test_no_disk_space_left(tmp_path, jsonl):
    limited = (
        "import resource, sys; from flowhn_jax.commands.prepare import run;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); run(sys.argv[1:])"
    )
    arguments = [f"--source={jsonl}", f"--out={tmp_path / 'set'}", "--tokenizer=bytes"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]
