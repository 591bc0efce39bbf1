import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from flowhn_jax.bench import throughput
from flowhn_jax.checkpoints import files as checkpoint_files
from flowhn_jax.checkpoints import free_space as disk
from flowhn_jax.checkpoints import manifest
from flowhn_jax.checkpoints.checkpointer import Checkpoints
from flowhn_jax.checkpoints.parameters import find_step, load_params, save_params
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.evaluation import evaluate as eval_run
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training import metrics as metrics_lib
from flowhn_jax.training.trainer import fit
from tests.training.test_trainer import (  # noqa: F401
    assert_is_the_uninterrupted_run,
    data,
    run_config,
    uninterrupted,
)

THROUGHPUT = {"throughput": throughput.measure}


@pytest.fixture
def whole(uninterrupted, tmp_path):  # noqa: F811
    """Return a copy of the uninterrupted run, with checkpoints of steps 6 and 8."""
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    return tmp_path / "run"


def restored_steps(workdir, config):
    """Return the step that a run would continue from, and what it logs."""
    lines = []
    with Checkpoints(str(workdir), config, lines.append) as checkpoints:
        mesh = make_mesh(config.mesh, 8)
        state, _ = checkpoints.restore(abstract_state(config, mesh), AnyData())
    return int(state.step), lines


class AnyData:
    """Batches that continue from any position."""

    async def load(self, directory):
        async def read():
            json.loads((directory / "batches.json").read_text())

        return read()

    async def save(self, directory):
        raise NotImplementedError


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_each_holds_its_config_versions_and_hashes(data, whole):  # noqa: F811
    folder = whole / "checkpoints" / "8"
    about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert about["config"] == json.loads((whole / "config.json").read_text())
    assert about["versions"]["jax"] == jax.__version__
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert {folder / name for name in hashes} == {*files_of(folder)} - {folder / "manifest.json"}
    assert manifest.damage(folder) is None


def harm(path, kind):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "removed"])
def test_a_damaged_one_is_named_and_skipped(data, whole, uninterrupted, rng, kind):  # noqa: F811
    config = run_config(data)
    victims = [p for p in files_of(whole / "checkpoints" / "8") if p.stat().st_size]
    if kind == "removed":  # without hashes it would count as undamaged
        victims = [path for path in victims if path.name != "manifest.json"]
    victim = victims[rng.integers(len(victims))]
    harm(victim, kind)
    step, lines = restored_steps(whole, config)
    assert step == 6
    assert "the checkpoint of step 8 is damaged and skipped" in lines[0]
    name = str(victim.relative_to(whole / "checkpoints" / "8"))
    assert name in lines[0] or name == "manifest.json"
    assert (whole / "damaged" / "8").is_dir()
    # The run repeats the lost steps, bit for bit.
    fit(config, str(whole))
    assert_is_the_uninterrupted_run(whole, config, uninterrupted)


def test_one_without_hashes_counts_until_it_cannot_be_read(data, whole):  # noqa: F811
    folder = whole / "checkpoints" / "8"
    (folder / "manifest.json").unlink()
    assert restored_steps(whole, run_config(data)) == (8, [])
    for path in (folder / "params" / "d").iterdir():
        harm(path, "truncated")
    with pytest.raises(ValueError, match="got '8'; that of step 8 is damaged"):
        load_params(str(whole), run_config(data).model, make_mesh(run_config(data).mesh, 8), "8")
    shutil.copytree(whole, whole.parent / "another")
    assert restored_steps(whole.parent / "another", run_config(data))[0] == 6
    (folder / "params" / "_METADATA").write_text("{")
    step, lines = restored_steps(whole, run_config(data))
    assert step == 6
    assert "the checkpoint of step 8 is damaged and skipped" in lines[0]


def test_if_all_are_damaged_no_run_starts_from_scratch(data, whole):  # noqa: F811
    for step in ("6", "8"):
        harm(whole / "checkpoints" / step / "params" / "_METADATA", "truncated")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged \(of steps 8, 6"):
            fit(run_config(data), str(whole))
    with pytest.raises(ValueError, match="are damaged: those of steps 8, 6"):
        load_params(str(whole), run_config(data).model, make_mesh(run_config(data).mesh, 8))


def test_a_reader_skips_a_damaged_one_too_and_moves_nothing(data, whole, capsys):  # noqa: F811
    harm(whole / "checkpoints" / "8" / "params" / "_METADATA", "flipped")
    config = run_config(data)
    mesh = make_mesh(config.mesh, 8)
    found = load_params(str(whole), config.model, mesh)
    assert "the checkpoint of step 8 is damaged: params/_METADATA" in capsys.readouterr().err
    jax.tree.map(
        np.testing.assert_array_equal, found, load_params(str(whole), config.model, mesh, "6")
    )
    assert (whole / "checkpoints" / "8").is_dir()


def test_the_named_one_must_not_be_damaged(data, whole):  # noqa: F811
    shutil.rmtree(whole / "checkpoints" / "8" / "params")
    with pytest.raises(ValueError, match=r"--checkpoint must name an undamaged .*; got '8';"):
        find_step(str(whole), "8")
    assert find_step(str(whole), "latest") == 6


def test_one_that_was_validated_after_it_was_written_can_be_the_best(data, whole):  # noqa: F811
    """As in a run that was stopped during the validation, and then resumed."""
    for step in (6, 8):
        path = whole / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
        about = json.loads(path.read_text())
        about["custom_metadata"]["metrics"] = None
        path.write_text(json.dumps(about))
        (path.parent / "manifest.json").unlink()
    assert find_step(str(whole), "best") == 8  # only its row has a validation
    (whole / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="--checkpoint=best needs a checkpoint with a"):
        find_step(str(whole), "best")


@pytest.mark.parametrize("best", [2, 4])
def test_one_whose_validation_was_made_up_for_is_not_deleted(data, tmp_path, best):  # noqa: F811
    """Two checkpoints hold no losses, and their rows have lower ones than the next two."""
    config = run_config(data, steps=6, checkpoint_every=2, eval_every=100, keep_checkpoints=3)
    fit(config, str(tmp_path))
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "validation_loss": 3.0 - (step == best)} for step in (2, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    resumed = {"steps": 8, "checkpoint_every": 8, "keep_checkpoints": 1}
    fit(
        dataclasses.replace(config, train=dataclasses.replace(config.train, **resumed)),
        str(tmp_path),
    )
    assert {int(each.name) for each in (tmp_path / "checkpoints").iterdir()} == {best, 8}


def test_a_full_quota_is_not_reported_as_missing_space(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(disk, "missing", lambda folder, needed: 0)
    (tmp_path / "checkpoints").mkdir()
    with Checkpoints(str(tmp_path), run_config(data)) as checkpoints:
        assert "or its quota, was full; there is no checkpoint yet" in checkpoints.shortage()


def test_another_model_is_reported_with_its_shapes(data, whole):  # noqa: F811
    config = run_config(data)
    wider = dataclasses.replace(config.model, mlp_width=2 * config.model.mlp_width)
    with pytest.raises(ValueError, match=r"differ in shape.*mlp.*24\) -> .*48"):
        load_params(str(whole), wider, make_mesh(config.mesh, 8))
    with pytest.raises(
        ValueError, match=r"model.mlp_width: 24 -> 48; therefore these .*differ in shape"
    ):
        fit(dataclasses.replace(config, model=wider), str(whole))


def test_the_newest_the_best_and_every_keep_every_are_kept(data, tmp_path):  # noqa: F811
    config = run_config(
        data,
        steps=20,
        checkpoint_every=2,
        eval_every=2,
        keep_checkpoints=2,
        keep_every=8,
        learning_rate=3.0,  # so that the last is not the best
        warmup=0.0,
        clip_norm=0.0,
    )
    fit(config, str(tmp_path))
    losses = {r["step"]: r["validation_loss"] for r in metrics_lib.read_rows(str(tmp_path))}
    best = min(losses, key=losses.get)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, 8, 16, 18, 20}
    mesh = make_mesh(config.mesh, 8)
    of_best, of_step = (
        load_params(str(tmp_path), config.model, mesh, which) for which in ("best", str(best))
    )
    jax.tree.map(np.testing.assert_array_equal, of_best, of_step)
    with pytest.raises(
        FileNotFoundError, match=r"--checkpoint must be latest, best or one of .*; got '7'"
    ):
        load_params(str(tmp_path), config.model, mesh, "7")


def test_eval_reads_the_requested_checkpoint(data, whole, capsys):  # noqa: F811
    found = []
    for checkpoint in ("6", None):
        eval_run.evaluate(run_config(data), str(whole), "perplexity", checkpoint)
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["nll"])
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="throughput, which reads no checkpoint"):
        eval_run.evaluate(
            run_config(data),
            None,
            "throughput",
            "best",
            benchmarks={"throughput": throughput.measure},
        )


def test_training_does_not_continue_from_parameters_alone(data, whole):  # noqa: F811
    config = run_config(data)
    params = load_params(str(whole), config.model, make_mesh(config.mesh, 8))
    shutil.rmtree(whole / "checkpoints")
    save_params(str(whole), config.model, params)
    with pytest.raises(ValueError, match=r"step 0 in .* holds parameters alone"):
        fit(config, str(whole))


def test_a_checkpoint_that_does_not_fit_is_logged_and_the_run_continues(
    data,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    """The disk has room again at step 6, and none at the last step."""
    config = run_config(data)
    missing = iter([123_456, 123_456, 0, 123_456, 123_456, 123_456])
    monkeypatch.setattr(disk, "missing", lambda *_: next(missing))
    with pytest.raises(
        OSError,
        match=r"ends at step 8 without a checkpoint: it takes .* newest .* step 6",
    ):
        fit(config, str(tmp_path))
    output = capsys.readouterr().err
    assert "no checkpoint of step 3" in output
    assert "0.123 MB are missing" in output
    monkeypatch.undo()
    assert restored_steps(tmp_path, config) == (6, [])


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    data,  # noqa: F811
    uninterrupted,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    config = run_config(data)
    calls = []

    def full(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(folder)

    write = manifest.write
    monkeypatch.setattr(manifest, "write", full)
    fit(config, str(tmp_path))
    assert "was full before a checkpoint was complete" in capsys.readouterr().err
    assert_is_the_uninterrupted_run(tmp_path, config, uninterrupted)


def make_incomplete(checkpoints, kind):
    """Add a step 99 that was never committed, or that is incomplete."""
    folder = checkpoints / "99"
    if kind == "empty":
        folder.mkdir()
        return
    shutil.copytree(checkpoints / "8", folder)
    (folder / "manifest.json").unlink()
    metadata = folder / "_CHECKPOINT_METADATA"
    if kind == "no metadata":
        metadata.unlink()
    elif kind == "empty metadata":
        metadata.write_bytes(b"")
    elif kind == "not committed":
        content = json.loads(metadata.read_text()) | {"commit_timestamp_nsecs": None}
        metadata.write_text(json.dumps(content))
    else:
        shutil.rmtree(folder / kind)


@pytest.mark.parametrize(
    "kind",
    ["empty", "no metadata", "empty metadata", "not committed", "optimizer", "params", "data"],
)
def test_a_step_counts_only_if_it_was_committed_and_is_complete(data, whole, kind, capsys):  # noqa: F811
    make_incomplete(whole / "checkpoints", kind)
    config = run_config(data)
    mesh = make_mesh(config.mesh, 8)
    found = load_params(str(whole), config.model, mesh)
    assert "the checkpoint of step 99 is damaged: " in capsys.readouterr().err
    expected = load_params(str(whole), config.model, mesh, "8")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    step, lines = restored_steps(whole, config)
    assert step == 8
    assert "the checkpoint of step 99 is damaged and skipped: " in lines[0]


def test_a_killed_deletion_leaves_nothing_that_looks_like_a_checkpoint(
    data,  # noqa: F811
    whole,
    monkeypatch,
):
    """The process is killed when half of the files are removed."""
    config = run_config(data)

    def killed(folder, **_):
        if not folder.is_dir():
            return
        for path in files_of(folder)[::2]:
            path.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_files.delete(str(whole), 6)
    monkeypatch.undo()
    assert checkpoint_files.steps_of(str(whole)) == [8]
    assert restored_steps(whole, config) == (8, [])
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"8"}
    assert not (whole / "damaged").exists()


def test_a_run_whose_checkpoints_are_gone_does_not_start_from_scratch(data, whole):  # noqa: F811
    config = run_config(data)
    rows = (whole / "metrics.jsonl").read_bytes()
    (whole / "checkpoints").rename(whole.parent / "unmounted")
    for folder_is_there in (False, True):
        if folder_is_there:
            (whole / "checkpoints").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"had checkpoints.* To start from scratch there"):
            fit(config, str(whole))
        assert (whole / "metrics.jsonl").read_bytes() == rows
    (whole / "checkpoints").rmdir()
    (whole.parent / "unmounted").rename(whole / "checkpoints")
    assert restored_steps(whole, config) == (8, [])


def test_files_are_on_the_disk_before_their_hashes(tmp_path, monkeypatch):
    """Every file and folder of a checkpoint, and then the hashes, their name last."""
    (tmp_path / "params").mkdir()
    for name in ("params/a", "_CHECKPOINT_METADATA"):
        (tmp_path / name).write_text("x")
    synced = []
    fsync = os.fsync

    def recorded(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    manifest.write(tmp_path)
    names = [os.path.relpath(path, tmp_path) for path in synced]
    before = names.index("manifest.json.tmp")
    assert {"params/a", "params", "_CHECKPOINT_METADATA", "."} <= {*names[:before]}
    assert names[before:] == ["manifest.json.tmp", "."]


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 64])
def test_a_torn_config_is_taken_from_the_checkpoint(data, whole, content, capsys):  # noqa: F811
    expected = (whole / "config.json").read_bytes()
    (whole / "config.json").write_bytes(content)
    config = dataclasses.replace(
        run_config(data), train=dataclasses.replace(run_config(data).train, steps=10)
    )
    fit(config, str(whole))
    assert "using the config in the newest checkpoint" in capsys.readouterr().err
    written = json.loads((whole / "config.json").read_text())
    assert written["model"] == json.loads(expected)["model"]
