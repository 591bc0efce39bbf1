import dataclasses
import json
import random
import shutil

import pytest

from flowhn_jax.storage import place
from flowhn_jax.training.trainer import fit
from tools.chaos import FAILURES, Soak
from tools.disk import FileLimit
from tools.harm import HARMS, Damages, Scene
from tools.same_run import differences
from tools.small_run import prepare_text, small_config

COUNTS = {"rows_compared": 4}
NO_FAILURES = dict.fromkeys(FAILURES, 0)
STEPS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder in which all soaks share the uninterrupted run and compiled programs."""
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    cadence = {"log_every": 2, "eval_every": 4, "checkpoint_every": 4}
    config = small_config(prepare_text(folder), steps=8, **cadence)
    fit(config, str(folder / "run"))
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def found(workdir, expected):
    return {name: n for name, n in differences(workdir, expected).items() if n}


@pytest.mark.slow
def test_a_harmed_run_ends_like_an_uninterrupted_one(folder):
    result = Soak(folder, steps=STEPS, seed=1).run(seconds=20, kills=3)
    assert {name: result[name] for name in FAILURES} == NO_FAILURES
    assert result["rounds"] >= 1
    assert result["rows_compared"] >= 300
    assert result["kills"] == sum(result[name] for name in HARMS)


@pytest.mark.slow
def test_a_harmed_run_in_a_bucket_ends_like_an_uninterrupted_one(folder, bucket, monkeypatch):
    monkeypatch.setattr("tools.chaos._SHARE_OF_REMOVED_LOCKS", 1.0)
    soak = Soak(folder, steps=STEPS, seed=1, bucket=place(bucket))
    result = soak.run(seconds=20, kills=3)
    assert {name: result[name] for name in FAILURES} == NO_FAILURES
    assert result["rounds"] >= 1
    assert result["rows_compared"] >= 300


def test_a_run_is_the_same_as_its_copy(run, copy):
    assert found(copy, run) == COUNTS


def test_a_different_state_is_found(run, copy, tmp_path):
    text = json.loads((run / "config.json").read_text())
    other = small_config(text["data"]["path"], **text["train"] | {"seed": 1})
    fit(other, str(tmp_path / "other"))
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", copy / "checkpoints")
    arrays = found(copy, run)
    # Of what all seeds share at the start only counters stay the same.
    assert arrays.pop("differing_arrays") > 40
    assert arrays == COUNTS


def test_lost_doubled_and_changed_rows_are_found(run, copy):
    path = copy / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    scalars = len(json.loads(lines[1])) - len(("step", "time", "mfu", "mfu_palm"))
    assert found(copy, run) == {**COUNTS, "lost_rows": 1, "tensorboard_differences": scalars}
    path.write_text("".join([*lines, lines[-1]]))
    assert found(copy, run) == {**COUNTS, "doubled_rows": 1}
    row = json.loads(lines[0])
    for name, differs in (("loss", 1), ("tokens_per_second", 0)):
        changed = json.dumps(row | {name: row[name] + 1}) + "\n"
        path.write_text("".join([changed, *lines[1:]]))
        assert differences(copy, run)["changed_rows"] == differs


def test_a_step_twice_in_tensorboard_is_found(run, copy):
    (path,) = (copy / "tensorboard").iterdir()
    shutil.copy(path, f"{path}.again")
    assert found(copy, run).keys() == {*COUNTS, "tensorboard_differences"}


def test_the_only_whole_checkpoint_is_not_damaged(copy, rng):
    class Random:
        choice = staticmethod(lambda of: of[int(rng.integers(len(of)))])
        randrange = staticmethod(lambda stop: int(rng.integers(stop)))

    damages = Damages()
    assert [path.name for path in damages.whole(copy)] == ["8", "4"]
    assert "checkpoints/8/" in damages.damage(copy, Random)
    assert [path.name for path in damages.whole(copy)] == ["4"]
    assert damages.damage(copy, Random) is None


class FakeTrainer:
    """A trainer that runs until it is killed, or ended with a status and lines of output."""

    pid, age, step = 7, 1.0, 4

    def __init__(self, status=None, lines=()):
        self.status, self.lines = status, lines

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_for_step(self, seconds):
        return True

    def send(self, number):
        self.status = -number

    def wait(self, seconds):
        return self.status


def scene_of(workdir, second=None):
    return Scene(
        random.Random(3), place(workdir), None, Damages(), FakeTrainer(), lambda *_: second
    )


def test_a_killed_deletion_leaves_part_of_the_oldest_checkpoint(run, copy):
    outcome = HARMS["killed_deletion"](scene_of(copy))
    assert (outcome.broken, outcome.harm) == (None, None)
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"8", "deleted.4"}
    left, whole = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (copy / "checkpoints" / "deleted.4", run / "checkpoints" / "4")
    )
    assert left <= whole
    assert HARMS["killed_deletion"](scene_of(copy)).harm == "SIGKILL"  # only one checkpoint is left


@pytest.mark.parametrize(
    ("status", "line", "is_broken"),
    [
        (1, "error: 'run' is in use by another process; wait for it", False),
        (0, "error: 'run' is in use by another process; wait for it", True),
        (1, "error: something else", True),
    ],
)
def test_a_second_trainer_is_refused_without_the_lock_file(copy, status, line, is_broken):
    outcome = HARMS["removed_lock"](scene_of(copy, FakeTrainer(status, [line])))
    assert not (copy / "lock").exists()
    assert (outcome.broken is not None) == is_broken


@pytest.mark.parametrize(
    ("status", "lines", "broken"),
    [
        (1, ["error: The folder absent of prepared data does not exist; prepare it by"], None),
        (1, [], "an error of one of four processes gave 0 messages"),
        (0, ["error: absent"], "an error of one process ended four with statuses [0, 1, 1, 1]"),
        (None, ["error: absent"], "an error of one process ended four with statuses [None"),
        (-6, ["error: absent"], "an error of one process ended four with statuses [-6"),
    ],
)
def test_an_error_of_one_of_four_processes_ends_all_with_one_message(copy, status, lines, broken):
    scene, started = scene_of(copy), []

    def start(*flags):
        started.append(flags)
        return FakeTrainer(1) if len(started) > 1 else FakeTrainer(status, lines)

    outcome = HARMS["one_of_four"](dataclasses.replace(scene, start=start))
    assert [f"--process_id={n}" in flags for n, flags in enumerate(started)] == [True] * 4
    assert sum("--config.data.path=absent" in flags for flags in started) == 1
    assert outcome.broken == broken or outcome.broken.startswith(broken)


@pytest.mark.slow
def test_a_soak_works_without_the_right_to_mount_a_disk(folder, monkeypatch):
    monkeypatch.setattr("tools.chaos.open_disk", FileLimit)
    monkeypatch.setattr("tools.chaos.HARMS", {"disk_full": HARMS["disk_full"]})
    result = Soak(folder, steps=STEPS, seed=0).run(seconds=20, kills=1)
    assert result["disk_full"] == result["kills"]
    assert {name: result[name] for name in FAILURES} == NO_FAILURES
