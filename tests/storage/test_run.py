"""A run in a bucket is, bit for bit, a local one: whatever is damaged, refused or missing."""

import json
import time

import pytest

from flowhn_jax import storage
from flowhn_jax.checkpoints import files, manifest
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.evaluation.evaluate import evaluate
from flowhn_jax.storage import lease, requests
from flowhn_jax.training import bucket_metrics, console
from flowhn_jax.training.trainer import fit
from tests.profiling import usable_profiler  # noqa: F401
from tests.slow import all_but
from tests.storage.emulator import used
from tests.training.test_trainer import data, run_config  # noqa: F401
from tools.faults import FaultyStore
from tools.same_run import differences

ROWS = {"rows_compared": 4}


@pytest.fixture(scope="module")
def local(data, tmp_path_factory):  # noqa: F811
    """Return the workdir of a local run of 8 steps, with checkpoints of 6 and 8."""
    folder = tmp_path_factory.mktemp("runs") / "local"
    fit(run_config(data), str(folder))
    return folder


def found(workdir, expected):
    return {name: n for name, n in differences(workdir, expected).items() if n}


def test_a_run_in_a_bucket_is_a_local_one(data, local, bucket, tmp_path, capsys):  # noqa: F811
    workdir = f"{bucket}/run"
    assert not fit_until(run_config(data), workdir, 4)
    assert fit(run_config(data), workdir)
    assert found(workdir, local) == ROWS
    folder = storage.place(workdir)
    assert not (folder / "lock").exists()
    assert (folder / "config.json").read() == (local / "config.json").read_bytes()
    assert files.steps_of(workdir) == files.steps_of(str(local))
    assert len((folder / "tensorboard").children()) == 1
    newest = files.directory(workdir) / "8"
    assert manifest.damage(newest) is None
    listed = json.loads((newest / "manifest.json").read_text())["crc32c"]
    assert set(listed) == {name for name, _ in newest.walk()} - {"manifest.json"}
    for mode, flags in (
        ("perplexity", {"by_position": True}),
        ("generate", {"prompt": "The", "max_new_tokens": 4}),
    ):
        of_local = evaluated(capsys, local, mode, flags)
        assert evaluated(capsys, workdir, mode, flags) == of_local
    assert (folder / "by_position.csv").read() == (local / "by_position.csv").read_bytes()
    assert (folder / "by_position.png").size() > 1000
    # The run that is downloaded is read and verified as well.
    for name, file in folder.walk():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(file.read())
    assert manifest.damage(tmp_path / "copy" / "checkpoints" / "8") is None
    assert found(tmp_path / "copy", local) == ROWS


def evaluated(capsys, workdir, mode, flags):
    """Return the results that an evaluation prints, without what depends on the clock."""
    capsys.readouterr()
    evaluate(None, str(workdir), mode, **flags)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {name: value for name, value in found.items() if "second" not in name}


def fit_until(config, workdir, step):
    """Train as `fit` to a step, where the run stops as by a signal; return whether it ended."""
    from flowhn_jax.training.health.preemption import StopRequest

    steps = []

    def on_step(*_):
        steps.append(1)
        if len(steps) == step:
            stop.request("test")

    with StopRequest() as stop:
        return fit(config, workdir, on_step, stop)


@pytest.mark.parametrize(
    "how", all_but(["flipped"], ["flipped", "truncated", "removed", "uncommitted"])
)
def test_a_damaged_checkpoint_is_set_aside(data, local, bucket, how, rng, capsys):  # noqa: F811
    workdir = f"{bucket}/run"
    fit(run_config(data), workdir)
    newest = files.directory(workdir) / "8"
    objects = [each for each in newest.walk() if each[1].size() and "manifest" not in each[0]]
    name, victim = objects[int(rng.integers(len(objects)))]
    if how == "uncommitted":  # as a save that was killed
        name, victim = files.COMMITTED, newest / files.COMMITTED
    content = victim.read()
    if how == "flipped":
        victim.write_whole(bytes([content[0] ^ 1]) + content[1:])
    elif how == "truncated":
        victim.write_whole(content[:-1])
    else:
        victim.remove()
    is_damage = (newest / files.COMMITTED).is_file()
    if is_damage:
        assert name in manifest.damage(newest)
    else:
        assert files.steps_of(workdir) == [6]
    assert fit(run_config(data), workdir)
    assert found(workdir, local) == ROWS
    aside = {path.name for path in (storage.place(workdir) / "damaged").children()}
    assert aside == ({"8"} if is_damage else set())


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(data, bucket):  # noqa: F811
    workdir = f"{bucket}/run"
    fit(run_config(data), workdir)
    for step in files.steps_of(workdir):
        (files.directory(workdir) / str(step) / files.COMMITTED).remove()
    with pytest.raises(ValueError, match=r"had checkpoints, but .gs://.* holds none now"):
        fit(run_config(data), workdir)


@pytest.fixture
def impatient(monkeypatch):
    """Let requests give up in a fraction of a second."""
    import gcsfs

    for name in ("_FIRST_PAUSE", "_LONGEST_PAUSE"):
        monkeypatch.setattr(requests, name, 0.05)
    monkeypatch.setattr(requests, "_SECONDS", dict.fromkeys((403, 429, 503), 0.5))
    monkeypatch.setattr("flowhn_jax.storage.lease.SECONDS_TO_RENEW", 0.1)
    for name in ("_SECONDS_BETWEEN_TRIES", "_SECONDS_TO_FLUSH", "_SECONDS_AT_THE_END"):
        monkeypatch.setattr(bucket_metrics, name, 2.0)
    monkeypatch.setattr(gcsfs.GCSFileSystem, "retries", 1)


@pytest.fixture
def store(emulator, bucket):
    with FaultyStore(emulator) as store, used(store.url):
        yield store


class Outage:
    """Refuses requests after a step until after another one."""

    def __init__(self, store, code, first, last):
        self.store, self.code, self.first, self.last, self.step = store, code, first, last, 0

    def __call__(self, *_):
        self.step += 1
        if self.step == self.first:
            self.store.refuse(self.code)
            time.sleep(2 * lease.SECONDS_TO_RENEW)  # from now on the lock is too old to save
        if self.step == self.last:
            self.store.serve()


@pytest.mark.parametrize(
    "code", [503, *(pytest.param(code, marks=pytest.mark.slow) for code in (403, 429))]
)
def test_a_run_continues_while_a_bucket_refuses(
    data,  # noqa: F811
    local,
    bucket,
    store,
    code,
    impatient,
    monkeypatch,
    capfd,
):
    outage = Outage(store, code, 2, 7)
    monkeypatch.setattr(console.Console, "count_step", outage)
    assert fit(run_config(data), f"{bucket}/run")
    said = capfd.readouterr()
    assert store.answered[code] > 2
    assert f"{code} " in said.out + said.err
    assert "no checkpoint of step 3" in said.out + said.err
    assert files.steps_of(f"{bucket}/run") == [8]
    assert found(f"{bucket}/run", local) == ROWS


@pytest.mark.slow
def test_a_run_that_cannot_save_at_its_end_fails(
    data,  # noqa: F811
    local,
    bucket,
    store,
    impatient,
    monkeypatch,
    capfd,
):
    monkeypatch.setattr(console.Console, "count_step", Outage(store, 503, 4, 99))
    with pytest.raises(OSError, match=r"the run ends at step 8 without a checkpoint: .*gs://"):
        fit(run_config(data), f"{bucket}/run")
    store.serve()
    assert files.steps_of(f"{bucket}/run") in ([], [3])
    (storage.place(f"{bucket}/run") / "lock").remove()
    assert fit(run_config(data), f"{bucket}/run")
    assert found(f"{bucket}/run", local) == ROWS


def test_a_run_whose_lock_is_taken_over_writes_nothing_more(
    data,  # noqa: F811
    bucket,
    monkeypatch,
):
    monkeypatch.setattr("flowhn_jax.storage.lease.SECONDS_TO_RENEW", 0.1)
    lock = storage.place(bucket) / "run" / "lock"
    other = json.dumps({"host": "other", "pid": 7, "token": "x"})
    steps = []

    def take_over(*_):
        steps.append(1)
        if len(steps) == 4:
            lock.write_whole(other)
            time.sleep(1)

    monkeypatch.setattr(console.Console, "count_step", take_over)
    with pytest.raises(OSError, match="was taken over by process 7 on host other"):
        fit(run_config(data), f"{bucket}/run")
    assert len(steps) < 8
    assert lock.read_text() == other
    assert files.steps_of(f"{bucket}/run") in ([], [3])


def test_rows_are_kept_in_parts(bucket, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket_metrics, "_PART_BYTES", 100)
    lock = storage.Lock()
    with bucket_metrics.BucketMetricsWriter(bucket, 0, print, lock) as writer:
        for step in range(1, 11):
            writer.write({"step": step, "loss": 1.5, "time": 1.0})
        assert writer.flush()
        parts = [each.name for each in storage.place(bucket).children() if "jsonl" in each.name]
        assert parts[-1] == "metrics.jsonl"
        assert parts[0] == "metrics-00001.jsonl"
        assert len(parts) > 2
        assert [row["step"] for row in read_rows(bucket)] == [*range(1, 11)]
        writer.drop_rows_after(2)
        assert writer.flush()
        assert [row["step"] for row in read_rows(bucket)] == [1, 2]
    with bucket_metrics.BucketMetricsWriter(bucket, 1, print, lock) as writer:
        writer.write({"step": 2, "loss": 2.5, "time": 1.0})
    rows = read_rows(bucket)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.5), (2, 2.5)]


def test_rows_are_written_once_a_minute_and_at_validations(bucket, monkeypatch):
    monkeypatch.setattr(bucket_metrics, "_SECONDS_BETWEEN_UPLOADS", 0.1)
    with bucket_metrics.BucketMetricsWriter(bucket, 0, print, storage.Lock()) as writer:
        writer.write({"step": 1, "loss": 1.5})
        while not read_rows(bucket):
            pass
        monkeypatch.setattr(bucket_metrics, "_SECONDS_BETWEEN_UPLOADS", 1000.0)
        assert writer.flush()
        writer.write({"step": 2, "loss": 1.5, "validation_loss": 1.0})
        while len(read_rows(bucket)) < 2:
            pass


@pytest.mark.slow
@pytest.mark.usefixtures("usable_profiler")
def test_a_branch_into_a_bucket_and_out_of_it(data, local, bucket, tmp_path):  # noqa: F811
    workdir = f"{bucket}/branch"
    into = run_config(data, branch_from=f"{local}/checkpoints/6", profile="7:2")
    assert fit(into, workdir)
    assert found(workdir, local) == ROWS
    (profile,) = (storage.place(workdir) / "tensorboard/plugins/profile/step_7").children()
    assert profile.size() > 1000
    assert fit(run_config(data, steps=9, branch_from=f"{workdir}/checkpoints/8"), str(tmp_path))
    assert [row["step"] for row in read_rows(tmp_path)] == [2, 4, 6, 8, 9]
