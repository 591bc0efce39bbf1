"""An error that one of two processes has while both train: they stop together and save."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.data.prepared import PreparedSet
from tests.training.test_processes import free_address
from tests.training.test_trainer import data  # noqa: F401
from tools.same_run import differences

# Runs `fit` for each workdir, as train.py does; process 0 has the error of `harm`.
_MAIN = """
import errno, json, sys
from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints import manifest
from flowhn_jax.commands import runner
from flowhn_jax.parallel import distributed
from flowhn_jax.training import metrics
from flowhn_jax.training.trainer import fit
from orbax.checkpoint._src.path import atomicity

text, address, process, harm, *workdirs = sys.argv[1:]
del sys.argv[1:]

def broken(*_):
    raise OSError(errno.EIO, "Input/output error", "the broken disk")

if process == "1":
    harm = "none"
append, write = metrics._append, manifest.write
if harm == "row":
    metrics._append = lambda path, text: (broken if b'"step": 4,' in text else append)(path, text)
elif harm == "hashes":
    manifest.write = lambda folder: (broken if folder.name == "4" else write)(folder)
elif harm == "folder":
    async def create(*_, **__):
        broken()
    atomicity._create_paths = create

def main():
    distributed.initialize(address, 2, int(process))
    for workdir in workdirs:
        fit(config_lib.parse(json.loads(text)), workdir)

with runner.command("train", lambda flags: main) as run:
    run()
"""


def keys(folder, **train):
    cadence = {"log_every": 2, "eval_every": 4, "checkpoint_every": 100, "eval_windows": 8}
    model = {"kind": "llama", "vocab_size": 257, "context": 24, "width": 16, "mlp_width": 24}
    model |= {"blocks": 1, "heads": 2, "kv_heads": 1, "dtype": "float32"}
    return {
        "model": model,
        "train": {"batch_size": 8, "steps": 8, **cadence, **train},
        "data": {"path": str(folder)},
        "mesh": {"data": 2},
    }


def fit_in_two(config, *workdirs, harm="none", limited=(), limit=0):
    """Return statuses and outputs of two processes; files of the limited ones cannot grow."""
    text, address = json.dumps(config), free_address()
    # A limit would cut what is kept of compilations.
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if limited else {}
    environment = os.environ | {"XLA_FLAGS": ""} | cache
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", _MAIN, text, address]
    processes = [
        subprocess.Popen(
            [*command, str(index), harm, *map(str, workdirs)], env=environment, **pipes
        )
        for index in range(2)
    ]
    for index in limited:
        sizes = (limit, resource.RLIM_INFINITY)
        resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE, sizes)
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


@pytest.fixture
def own_data(data, tmp_path):  # noqa: F811
    return shutil.copytree(data, tmp_path / "set")


def damage(folder, split, windows):
    """Flip a bit of one of these windows' records; return the file and its whole content."""
    shard = folder / PreparedSet.open(folder).splits[split].shards[0].file
    whole = shard.read_bytes()
    for at in range(0, len(whole), 16):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        source = PreparedSet.open(folder).windows(split)
        if (
            not is_readable(source, windows)
            and sum(not is_readable(source, [window]) for window in range(len(source))) == 1
        ):
            return shard, whole
    raise AssertionError("no byte belongs to one of these windows alone")


def is_readable(source, windows):
    try:
        return bool([source[window] for window in windows])
    except ValueError:
        return False


def windows_of_second_process(folder, step):
    config = config_lib.parse(keys(folder))
    batches = train_batches(PreparedSet.open(folder), batch_size=8, seed=config.data.seed)
    try:
        return batches.windows_of(step - 1)[4:]
    finally:
        batches.close()


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def assert_is_one_message(statuses, said, message):
    """Return the line that follows it."""
    assert statuses == [1, 1], said
    lines = "".join(said).splitlines()
    (found,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert message in lines[found], said
    assert not [line for line in lines if "Traceback" in line or "*** Check" in line], said
    assert "Warning" not in "".join(said)
    return lines[found + 1] if found + 1 < len(lines) else ""


def assert_continues_as_undisturbed(folder, workdir):
    """Check that the run ends with the arrays, rows and events of an undisturbed run."""
    expected = workdir.with_name("undisturbed")
    statuses, said = fit_in_two(keys(folder), workdir, expected)
    assert statuses == [0, 0], said
    found = differences(workdir, expected)
    assert found.pop("rows_compared") == 4
    assert not any(found.values()), found


@pytest.mark.slow
def test_a_damaged_shard_of_one_process(own_data, tmp_path):
    """What was trained is saved; with a whole shard the run ends as the undisturbed one."""
    shard, whole = damage(own_data, "train", windows_of_second_process(own_data, 7))
    workdir = tmp_path / "run"
    statuses, said = fit_in_two(keys(own_data), workdir)
    following = assert_is_one_message(statuses, said, "of the train split in ")
    assert "newest checkpoint is that of step 6, from which the same command c" in following
    assert saved_steps(workdir) == [6]
    shard.write_bytes(whole)
    assert_continues_as_undisturbed(own_data, workdir)


@pytest.mark.slow
def test_a_damaged_validation_shard_of_one_process(own_data, tmp_path):
    """The row of the validation is written when the run continues."""
    shard, whole = damage(own_data, "validation", [5, 6])
    workdir = tmp_path / "run"
    statuses, said = fit_in_two(keys(own_data), workdir)
    assert_is_one_message(statuses, said, "of the validation split in ")
    assert saved_steps(workdir) == [4]
    shard.write_bytes(whole)
    assert_continues_as_undisturbed(own_data, workdir)


@pytest.mark.parametrize(
    ("harm", "saved"),
    [
        # The row is not on the disk, and without it no checkpoint counts.
        pytest.param("row", 2, marks=pytest.mark.slow),
        ("hashes", 5),
        pytest.param("folder", None, marks=pytest.mark.slow),
    ],
)
def test_a_broken_disk_of_the_first_process(data, tmp_path, harm, saved):  # noqa: F811
    """The run stops for it; a new checkpoint holds what was trained, where one can be written."""
    workdir = tmp_path / "run"
    every = {"checkpoint_every": 2, "steps": 20, "eval_every": 20}
    statuses, said = fit_in_two(keys(data, **every), workdir, harm=harm)
    message = "error: Input/output error: 'the broken disk'"
    following = assert_is_one_message(statuses, said, message)
    if saved is None:
        assert "there is no checkpoint of it" in following
    else:
        newest = json.loads((workdir / "checkpointed.json").read_text())["step"]
        assert f"newest checkpoint is that of step {newest}, from" in following
        assert newest == saved if harm == "row" else newest > 4


@pytest.mark.parametrize("limited", [pytest.param((0, 1), marks=pytest.mark.slow), (1,)])
def test_a_disk_that_is_full_for_one_or_both(data, tmp_path, limited):  # noqa: F811
    """One line, and training continues; here the only checkpoint is that of the last step."""
    config = keys(data, steps=2, eval_every=2)
    statuses, said = fit_in_two(config, tmp_path / "run", limited=limited, limit=4000)
    assert_is_one_message(statuses, said, "error: the run ends at step 2 without a checkpoint")
    assert "".join(said).count("the disk was full before a checkpoint was complete") == 1
    assert "Event loop is closed" not in "".join(said)
    assert len("".join(said).splitlines()) < 20, said
