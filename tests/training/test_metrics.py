import json
import os
import struct

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.training import metrics
from flowhn_jax.training.metrics import MetricsWriter


def row(step, **values):
    return {"step": step, "loss": 1.5, "tokens_per_second": 10.0, "mfu": None, "time": 1.0} | values


def steps_in_events(workdir):
    """Return the steps in TensorBoard's files, as a reader that drops some at a restart does."""
    steps = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            if event.HasField("session_log"):
                steps = [step for step in steps if step < event.step]
            if event.HasField("summary"):
                steps.append(event.step)
                tags = {value.tag for value in event.summary.value}
                assert tags == {"train/loss", "speed/tokens_per_second"}
    return steps


def test_rows_and_events_have_each_step_once_after_restarts(tmp_path):
    for start, stop in ((0, 6), (4, 9), (4, 7), (7, 12)):
        with MetricsWriter(str(tmp_path), start) as writer:
            for step in range(start + 1, stop + 1):
                writer.write(row(step))
                assert steps_in_events(tmp_path) == list(range(1, step + 1))
    assert [r["step"] for r in read_rows(tmp_path)] == list(range(1, 13))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_truncated_last_line_is_removed(tmp_path):
    with MetricsWriter(str(tmp_path), 0) as writer:
        writer.write(row(1))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in read_rows(tmp_path)] == [1]
    with MetricsWriter(str(tmp_path), 1) as writer:
        writer.write(row(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("line", [b"\xff\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "1"}\n', b"\n"])
def test_a_damaged_line_is_reported(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl' is damaged: line 2 is not a row"):
        read_rows(tmp_path)


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    with MetricsWriter(str(tmp_path), 0) as writer:
        writer.write(row(1))
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_append", full)
            writer.write(row(2))
            writer.write(row(3))
            assert not writer.flush()
        assert [r["step"] for r in read_rows(tmp_path)] == [1]
        assert "of metrics.jsonl (" in (said := capsys.readouterr().out)
        assert "is full: 2 rows of" in said
        assert writer.flush()
        assert steps_in_events(tmp_path) == [1, 2, 3]
        writer.write(row(4))
        assert steps_in_events(tmp_path) == [1, 2, 3, 4]
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3, 4]
    with MetricsWriter(str(tmp_path), 4):
        assert steps_in_events(tmp_path) == [1, 2, 3, 4]


def test_tensorboard_catches_up_after_a_full_disk(tmp_path, monkeypatch):
    with MetricsWriter(str(tmp_path), 0) as writer:
        writer.write(row(1))

        def full(row):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer._events, "add", full)
        writer.write(row(2))
        writer.write(row(3))
        assert steps_in_events(tmp_path) == [1, 2, 3]


def test_another_error_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def broken(path, text):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(metrics, "_append", broken)
    with (
        MetricsWriter(str(tmp_path), 0) as writer,
        pytest.raises(OSError, match="Input/output error"),
    ):
        writer.write(row(1))


def test_a_full_disk_is_recognised(tmp_path):
    wrapped = ValueError("outer")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert disk.is_full(wrapped)
    assert disk.is_full(RuntimeError("RESOURCE_EXHAUSTED: Error writing: No space left on device"))
    assert disk.is_full(OSError(27, "File too large"))
    assert not disk.is_full(OSError(2, "No such file"))
    device = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert not disk.is_full(device)
    assert disk.missing(tmp_path, 1) == 0
    assert disk.missing(tmp_path, 1 << 60) > 1 << 58


def test_zeros_after_the_last_row_are_dropped_and_reported(tmp_path, capsys):
    with MetricsWriter(str(tmp_path), 0) as writer:
        writer.write(row(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert [r["step"] for r in read_rows(tmp_path)] == [1]
    with MetricsWriter(str(tmp_path), 1) as writer:
        writer.write(row(2))
    assert "ended with 512 bytes that are not a row" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_link_in_place_of_the_rows_is_refused(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(target)
    with pytest.raises(ValueError, match=r"metrics.jsonl' must be a file .* it is a link"):
        MetricsWriter(str(tmp_path), 0)
    assert target.read_text() == "mine"


def test_event_files_of_others_are_left_alone(tmp_path):
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    others = folder / "events.out.tfevents.1700000000.somehost"
    ours_of_an_earlier_version = folder / "events.out.tfevents.1700000000.h.1700000000000000000"
    for path in (others, ours_of_an_earlier_version):
        path.write_bytes(b"")
    for _ in range(2):
        with MetricsWriter(str(tmp_path), 0) as writer:
            writer.write(row(1))
    assert others.exists()
    assert not ours_of_an_earlier_version.exists()
    assert len(list(folder.iterdir())) == 2


def test_rows_are_synced_when_written(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recorded(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.extend([] if name.startswith("events.") else [name])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with MetricsWriter(str(tmp_path), 0) as writer:
        writer.write(row(1))
        assert synced == ["metrics.jsonl", tmp_path.name]
        writer.write(row(2))
        assert synced[2:] == ["metrics.jsonl"]
