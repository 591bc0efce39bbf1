"""Sweeps: what is trained, resumed and skipped, and the table at the end."""

import json
import os
import pathlib
import shutil
import signal
import statistics

import pytest

from flowhn_jax import config as config_lib
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.sweep.grid import parse_axes, points
from flowhn_jax.sweep.results import collect, tables
from flowhn_jax.sweep.sweep import sweep
from flowhn_jax.training import runs
from tests.command_line import call
from tests.commands.test_commands import SWEEP
from tests.small import small_config

STEPS = 4
GRID = ("train.learning_rate=1e-3,1e-2", "train.seed=0,1")
BITS = "validation_bits_per_byte"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from flowhn_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    text = pathlib.Path(__file__).parent.parent / "data" / "wikitext.txt"
    prepare(str(text), "bytes", str(folder / "set"), context=24)
    return str(folder / "set")


def grid_on(data, texts=GRID, **train):
    """Return the points of a grid and their configs."""
    found = points(parse_axes(texts))
    cadence = {"steps": STEPS, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
    configs = []
    for point in found:
        own = {key.removeprefix("train."): float(value) for key, value in point.values.items()}
        own["seed"] = int(own["seed"])
        groups = dict(model={"blocks": 1}, data={"path": data}, mesh={"data": 1})
        settings = {**cadence, "eval_windows": 4, **own, **train}
        configs.append(small_config("fac_split", train=settings, **groups))
    return found, configs


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    assert sweep(*grid_on(data), str(workdir)) == 0
    return workdir


@pytest.fixture
def trained(monkeypatch):
    """Return the names of the folders that are trained in."""
    fit, names = runs.fit, []

    def counting(config, workdir, on_step):
        names.append(os.path.basename(workdir))
        return fit(config, workdir, on_step)

    monkeypatch.setattr(runs, "fit", counting)
    return names


def test_each_row_is_of_its_run(data, whole):
    results = json.loads((whole / "sweep.json").read_text())
    assert [row["name"] for row in results["points"]] == [p.name for p in grid_on(data)[0]]
    for row in results["points"]:
        logged = read_rows(whole / row["name"])
        scored = [each[BITS] for each in logged if BITS in each]
        assert (row[BITS], row[f"best_{BITS}"]) == (scored[-1], min(scored))
        rates = [each["tokens_per_second"] for each in logged]
        assert row["tokens_per_second"] == statistics.median(rates)
        run = config_lib.parse(json.loads((whole / row["name"] / "config.json").read_text()))
        assert run.train.seed == row["train.seed"]
        assert run.train.learning_rate == row["train.learning_rate"]
    assert len({row[BITS] for row in results["points"]}) == 4


def test_means_over_the_seeds(whole):
    results = json.loads((whole / "sweep.json").read_text())
    for mean, group in zip(results["means"], (results["points"][:2], results["points"][2:]),
                           strict=True):  # fmt: skip
        bits = [row[BITS] for row in group]
        assert mean["train.learning_rate"] == group[0]["train.learning_rate"]
        assert mean["runs"] == 2
        assert mean[BITS] == pytest.approx(sum(bits) / 2)
        assert mean[f"{BITS}_deviation"] == pytest.approx(abs(bits[0] - bits[1]) / 2**0.5)
        row = f"{mean[BITS]:.4f} ± {mean[f'{BITS}_deviation']:.4f}"
        assert row in (whole / "sweep.md").read_text()
    assert (whole / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_is_missing_is_trained(data, whole, tmp_path, trained, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    sweep(*grid_on(data), str(tmp_path))
    assert trained == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == json.loads((whole / "sweep.json").read_text())
    shutil.rmtree(tmp_path / "learning_rate=1e-2_seed=0")
    sweep(*grid_on(data), str(tmp_path))
    assert trained == ["learning_rate=1e-2_seed=0"]
    again = json.loads((tmp_path / "sweep.json").read_text())["points"][2]
    first = json.loads((whole / "sweep.json").read_text())["points"][2]
    del again["tokens_per_second"], first["tokens_per_second"]
    assert again == first


def test_a_stopped_sweep_continues(data, whole, tmp_path, monkeypatch, capsys):
    """The signal comes in the second of two runs that are missing."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("learning_rate=1e-3_seed=1", "learning_rate=1e-2_seed=0"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "sweep.json").unlink()
    fit, calls = runs.fit, []

    def stopping(config, workdir, on_step):
        def stop():
            calls.append(workdir)
            on_step()
            if len(calls) == STEPS + 1:
                os.kill(os.getpid(), signal.SIGTERM)

        return fit(config, workdir, stop)

    monkeypatch.setattr(runs, "fit", stopping)
    sweep(*grid_on(data), str(tmp_path))
    assert "Stopped. Run the same command again to continue." in capsys.readouterr().out
    assert not (tmp_path / "sweep.json").exists()
    sweep(*grid_on(data), str(tmp_path))
    found, expected = (json.loads((w / "sweep.json").read_text()) for w in (tmp_path, whole))
    assert [row[BITS] for row in found["points"]] == [row[BITS] for row in expected["points"]]


def test_a_run_that_fails_is_a_row_and_the_others_follow(data, whole, tmp_path, trained, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("learning_rate=1e-3_seed=1", "learning_rate=1e-2_seed=0"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "learning_rate=1e-3_seed=1").write_text("mine")
    assert sweep(*grid_on(data), str(tmp_path)) == 1
    assert trained == ["learning_rate=1e-3_seed=1", "learning_rate=1e-2_seed=0"]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "must be a folder" in results["points"][1]["error"]
    assert [row["error"] is None for row in results["points"]] == [True, False, True, True]
    assert [mean["runs"] for mean in results["means"]] == [1, 2]
    assert results["means"][0][f"{BITS}_deviation"] is None
    assert "failed: --workdir must be a folder" in (tmp_path / "sweep.md").read_text()


def test_an_index_trains_one_point(data, whole, tmp_path, trained, capsys):
    assert sweep(*grid_on(data), str(tmp_path), index=2) == 0
    assert trained == ["learning_rate=1e-2_seed=0"]
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = json.loads((whole / "sweep.json").read_text())["points"][2]
    assert (row["name"], row[BITS]) == (expected["name"], expected[BITS])
    assert not (tmp_path / "sweep.json").exists()


def test_a_run_that_is_not_at_its_end_has_no_final_value(data, whole):
    """Its config asks for more steps than the folder has."""
    found, configs = grid_on(data, steps=99)
    results = collect(found, configs, str(whole), {})
    assert [row[BITS] for row in results["points"]] == [None] * 4
    assert all(row[f"best_{BITS}"] for row in results["points"])
    assert "step 4 of 99" in tables(results)


def test_the_command_lists_its_points():
    run = call(*SWEEP, "--grid=train.seed=0,1", "--grid=model.width=64,128", "--list")
    assert run.returncode == 0, run.stderr
    assert [line.split() for line in run.stdout.splitlines()] == [
        ["index", "train.seed", "model.width", "folder"],
        ["0", "0", "64", "seed=0_width=64"],
        ["1", "0", "128", "seed=0_width=128"],
        ["2", "1", "64", "seed=1_width=64"],
        ["3", "1", "128", "seed=1_width=128"],
    ]


@pytest.mark.slow
def test_the_command_trains_the_grid(data, tmp_path):
    """Keys of the command line hold for every point; a folder that is taken fails one of them."""
    sizes = ["--config.model.width=16", "--config.model.mlp_width=16", "--config.model.blocks=1"]
    sizes += ["--config.model.context=24", "--config.train.batch_size=2"]
    sizes += [f"--config.data.path={data}", "--config.train.eval_windows=2"]
    (tmp_path / "steps=2").write_text("mine")
    command = ["-m", "flowhn_jax", "sweep", "--config=flowhn_tiny", f"--workdir={tmp_path}"]
    run = call(*command, *sizes, "--grid=train.steps=1,2")
    assert run.returncode == 1
    assert "error: 1 of 2 runs failed" in run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])["points"]
    assert [row["step"] for row in rows] == [1, 0]
    config = config_lib.parse(json.loads((tmp_path / "steps=1" / "config.json").read_text()))
    assert (config.model.width, config.train.steps, config.data.path) == (16, 1, data)
