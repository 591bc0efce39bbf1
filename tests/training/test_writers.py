"""Where the rows of a run go: the choice of writers, and the trackers' offline modes."""

import importlib
import json
import struct
import sys

import pytest

from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.config import to_dict
from flowhn_jax.storage import Lock, place
from flowhn_jax.training import trackers
from flowhn_jax.training.events import tags
from flowhn_jax.training.trainer import fit
from flowhn_jax.training.writers import check_packages, open_writer
from tests.small import small_config


def row(step, **values):
    return {"step": step, "loss": step / 3, "tokens_per_second": 10.0, "mfu": None, "time": 1.0} | (
        values
    )


def config_with(writers):
    return small_config(train={"writers": writers})


def write(config, workdir, start, steps, log=print):
    """Write rows as a run that starts at `start` does; return whether they are on the disk."""
    with open_writer(config, str(workdir), start, log, Lock()) as writer:
        for step in steps:
            writer.write(row(step))
        return writer.flush()


class FakeTracker:
    """Keeps the runs that it has opened in `runs`, and the scalars that it got by step."""

    def __init__(self, folder, key, config):
        self.key, self.config, self.folder = key, config, folder
        self.sent, self.failed = [], None
        self.runs.append(self)

    def add(self, step, scalars):
        if step == self.refused:
            raise OSError("no route to host")
        self.sent.append((step, scalars))

    def close(self, *, has_failed):
        self.failed = has_failed


@pytest.fixture
def tracker(monkeypatch):
    """Put a fake tracker in the place of wandb."""

    class Fake(FakeTracker):
        runs, refused = [], None

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fake)
    return Fake


CONFIG = config_with("jsonl,wandb")


def test_a_resumed_run_continues_in_the_tracker_with_each_step_once(tmp_path, tracker):
    assert write(CONFIG, tmp_path, 0, range(1, 7))
    write(CONFIG, tmp_path, 4, range(5, 7))  # steps that are done again
    write(CONFIG, tmp_path, 4, range(5, 10))
    assert [r["step"] for r in read_rows(tmp_path)] == list(range(1, 10))
    assert [[step for step, _ in run.sent] for run in tracker.runs] == [
        [1, 2, 3, 4, 5, 6], [], [7, 8, 9]
    ]  # fmt: skip
    assert tracker.runs[0].sent[2] == (3, tags(row(3)))
    assert {run.key for run in tracker.runs} == {
        json.loads(place(tmp_path / "wandb.json").read())["id"]
    }
    assert [run.failed for run in tracker.runs] == [False] * 3
    assert tracker.runs[0].config == to_dict(CONFIG)
    assert str(tracker.runs[0].folder) == str(tmp_path)


def test_steps_after_a_rewind_are_sent_once_even_if_the_run_is_killed_then(tmp_path, tracker):
    with open_writer(CONFIG, str(tmp_path), 0, print, Lock()) as writer:
        for step in (1, 2, 3, 4):
            writer.write(row(step))
        writer.drop_rows_after(2)
        writer.write(row(3, loss=7.0))
    write(CONFIG, tmp_path, 2, range(3, 6))
    assert [[step for step, _ in run.sent] for run in tracker.runs] == [[1, 2, 3, 4], [5]]
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_added_later_gets_the_rows_so_far(tmp_path, tracker):
    write(config_with("jsonl"), tmp_path, 0, range(1, 7))
    write(CONFIG, tmp_path, 4, range(5, 7))
    assert [step for step, _ in tracker.runs[0].sent] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_fails_leaves_the_run_alone(tmp_path, tracker):
    tracker.refused = 2
    lines = []
    assert write(CONFIG, tmp_path, 0, (1, 2, 3), lines.append)
    assert [step for step, _ in tracker.runs[0].sent] == [1]
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2, 3]
    assert lines == ["wandb failed at step 2 and gets no more rows: no route to host"]


def test_a_tracker_learns_that_the_run_failed(tmp_path, tracker):
    with pytest.raises(KeyError), open_writer(CONFIG, str(tmp_path), 0, print, Lock()):
        raise KeyError
    assert tracker.runs[0].failed is True


def test_a_tracker_that_does_not_start_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no API key")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with pytest.raises(ValueError, match="has wandb, which does not start: no API key; WANDB_MODE"):
        write(CONFIG, tmp_path, 0, ())
    assert not (tmp_path / "wandb.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 3, "step": 1}', '{"id": "a"}'])
def test_a_damaged_file_of_a_tracker_is_named(tmp_path, tracker, content):
    (tmp_path / "wandb.json").write_text(content)
    with pytest.raises(ValueError, match=r"wandb.json' is damaged: .* Remove it to begin a new"):
        write(CONFIG, tmp_path, 0, ())
    assert not tracker.runs


def test_tensorboard_can_be_left_out(tmp_path, bucket):
    for workdir in (tmp_path, bucket):
        assert write(config_with("jsonl"), workdir, 0, (1, 2))
        assert [r["step"] for r in read_rows(workdir)] == [1, 2]
        assert not (place(workdir) / "tensorboard").exists()


def test_a_tracker_of_a_run_in_a_bucket_keeps_its_id_there(bucket, tracker):
    write(CONFIG, bucket, 0, (1, 2))
    write(CONFIG, bucket, 1, (2, 3))
    assert [[step for step, _ in run.sent] for run in tracker.runs] == [[1, 2], [3]]
    assert len({run.key for run in tracker.runs}) == 1


@pytest.mark.parametrize("names", ["", "tensorboard", "jsonl,jsonl", "jsonl, wandb", "jsonl,csv"])
def test_writers_that_cannot_be(names):
    with pytest.raises(ValueError, match=r"^train.writers must be jsonl, whose rows a resumed run"):
        config_with(names)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs the package '{name}': pip install {name}, or"):
        check_packages(f"jsonl,{name}")


def test_a_missing_package_ends_a_run_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="needs the package 'wandb'"):
        fit(CONFIG, str(tmp_path / "run"), on_step=lambda: None)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_package_s_name_is_not_the_package(monkeypatch, tmp_path):
    """Weights & Biases leaves a folder `wandb` where it is run."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ImportError, match="needs the package 'wandb'"):
        check_packages("jsonl,wandb")
    sys.modules.pop("wandb", None)


def requires(name):
    try:
        check_packages(name)
    except ImportError:
        pytest.skip(f"needs {name}")
    return importlib.import_module(name)


def wandb_history(path):
    """Return the scalars by step of an offline run's file, records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, data, found = path.read_bytes(), 7, b"", {}
    block = 32768
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole record or its last part
            record, data = Record.FromString(data), b""
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if items:
                scalars = {k: v for k, v in items.items() if not k.startswith("_")}
                assert items["_step"] not in found
                found[items["_step"]] = scalars
    return found


def test_wandb_offline(tmp_path, monkeypatch):
    requires("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_with("jsonl,tensorboard,wandb")
    write(config, tmp_path, 0, range(1, 7))
    write(config, tmp_path, 4, range(5, 10))
    key = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{key}.wandb"))
    first, second = map(wandb_history, files)
    assert not first.keys() & second.keys()
    assert first | second == {each["step"]: tags(each) for each in read_rows(tmp_path)}


def test_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    for name in [each for each in sys.modules if each.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    requires("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config, workdir = config_with("jsonl,trackio"), tmp_path / "run"
    workdir.mkdir()
    write(config, workdir, 0, range(1, 7))
    write(config, workdir, 4, range(5, 10))
    key = json.loads((workdir / "trackio.json").read_text())["id"]
    logs = SQLiteStorage.get_logs("flowhn", f"run-{key}")
    found = [{k: v for k, v in each.items() if k != "timestamp"} for each in logs]
    expected = [{"step": each["step"], **tags(each)} for each in read_rows(workdir)]
    assert found == expected
