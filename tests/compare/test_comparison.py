import csv
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest

from flowhn_jax import flops, models
from flowhn_jax.checkpoints.rows import read_rows
from flowhn_jax.compare import comparison as run
from flowhn_jax.compare import scores, speed, training_data
from flowhn_jax.compare.budget import Budget
from flowhn_jax.compare.comparison import Training
from flowhn_jax.compare.curves import learning_curves
from flowhn_jax.compare.speed import config_hash, missing_measurements, read_measurements
from flowhn_jax.config import MeshConfig, to_dict
from flowhn_jax.data.prepare import prepare
from flowhn_jax.evaluation import by_position
from flowhn_jax.evaluation.evaluate import evaluate
from flowhn_jax.training import runs
from tests.small import small_baseline, small_config

STEPS = 4
TRAINING = Training(Budget("tokens", STEPS * 8 * 24))


def configs_on(data):
    ours = small_config("fac_split", data={"path": data}, mesh={"data": 1})
    baseline = dataclasses.replace(ours, model=small_baseline("llama", vocab_size=257))
    return {"fac_split": ours, "llama": baseline}


def compare(configs, workdir, training=TRAINING, **options):
    settings = dict(size="tiny", rounds=2, repeats=2, report_only=False) | options
    run.compare(configs, workdir=str(workdir), training=training, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(__file__, folder / "text.txt")
    prepare(str(folder / "text.txt"), "bytes", str(folder / "set"), context=24)
    return str(folder / "set")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare")
    compare(configs_on(data), workdir)
    return workdir


def by_position_of(folder):
    """Return the curve that `eval.py --by_position` measures."""
    evaluate(None, str(folder), "perplexity", by_position=True)
    return by_position.read(str(folder))


def test_results(data, whole):
    """All columns of each model follow from its measurements and its run."""
    configs = configs_on(data)
    results = json.loads((whole / "results.json").read_text())
    assert (results["device"], results["rounds"], results["size"]) == ("cpu", 2, "tiny")
    assert results["jax"]
    measurements = read_measurements(str(whole), configs, "cpu")
    assert len(measurements) == 4
    for row, (name, config) in zip(results["models"], configs.items(), strict=True):
        assert row["model"] == name
        assert row["parameters"] == models.param_count(config.model)
        assert row["config_hash"] == config_hash(config)
        tokens = config.train.batch_size * config.model.context
        rates = sorted(
            tokens / (sum(each["seconds"]["train"]) / 2)
            for each in measurements
            if each["model"] == name
        )
        key = "train_tokens_per_second"
        assert [row[f"{key}_min"], row[f"{key}_max"]] == pytest.approx(rates)
        assert row[key] == pytest.approx(sum(rates) / 2)
        per_token = flops.train_flops(config.model, config.model.context) / config.model.context
        tflops = row["train_tflops_per_second_per_device"]
        assert tflops == pytest.approx(row[key] * per_token / 1e12)
        assert row["train_flops_per_token"] == per_token
        assert row["train_mfu"] is None
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert row["compile_seconds"] > 0
        state_bytes = 3 * 4 * row["parameters"]  # parameters and Adam's two moments
        assert state_bytes < row["train_memory_bytes"] < 100 * state_bytes
        assert row["trained_tokens"] == STEPS * tokens
        rows = read_rows(str(whole / name))
        (scored,) = [each for each in rows if "validation_loss" in each]
        assert row["trained_steps"] == STEPS
        seconds = sum(each["step_seconds"] for each in rows)  # a row for each step
        assert row["trained_seconds"] == pytest.approx(seconds)
        assert (row["seeds"], row["learning_rate"]) == (1, config.train.learning_rate)
        assert row["validation_bits_per_byte_deviation"] is None
        curve = by_position_of(whole / name)
        late = curve.nll[-3:].sum() / curve.targets[-3:].sum()  # of 24 positions
        assert row["end_of_context_loss"] == pytest.approx(late, rel=1e-5)
        assert row["validation_bits_per_byte"] == scored["validation_bits_per_byte"]


def test_files(whole):
    results = json.loads((whole / "results.json").read_text())
    with (whole / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["fac_split", "llama"]
    for row, expected in zip(rows, results["models"], strict=True):
        assert row == {key: "" if v is None else str(v) for key, v in expected.items()}
    table = (whole / "results.md").read_text().splitlines()
    assert table[0].startswith("| model ")
    assert len({len(line) for line in table[:4]}) == 1
    parameters = f"{results['models'][1]['parameters']:,}"
    assert table[3].split("|")[1].strip() == "llama"
    assert parameters in table[3]
    assert "bits/byte on the validation set after 768 tokens" in "\n".join(table)
    assert (whole / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("figure.svg", "curves.svg"):
        assert "<svg" in (whole / name).read_text()


def test_learning_curves(data, whole):
    """Seconds, FLOPs and losses are those of the rows; FLOPs end at those of all steps."""
    results = json.loads((whole / "results.json").read_text())
    curves = learning_curves(results["models"], results["runs"], str(whole))
    assert list(curves) == ["fac_split", "llama"]
    for name, config in configs_on(data).items():
        rows = read_rows(str(whole / name))
        curve = curves[name]
        assert curve.loss.tolist() == [row["loss"] for row in rows]
        seconds = np.cumsum([row["step_seconds"] for row in rows])
        assert curve.seconds == pytest.approx(seconds)
        assert curve.flops[-1] == pytest.approx(STEPS * 8 * flops.train_flops(config.model, 24))


def test_the_last_line_is_json_and_nothing_is_measured_again(data, whole, capsys, monkeypatch):
    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(speed, "time_programs", refuse)
    before = (whole / "results.json").read_text()
    compare(configs_on(data), whole)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        json.loads(last) == json.loads(before) == json.loads((whole / "results.json").read_text())
    )


def test_report_only(data, whole, tmp_path):
    shutil.copy(whole / "speed.jsonl", tmp_path)
    compare(configs_on(data), tmp_path, report_only=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["validation_loss"] for row in results["models"]] == [None, None]
    assert "bits/byte" not in (tmp_path / "results.md").read_text()
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; run the command without --report_only first"
    ):
        compare(configs_on(data), tmp_path / "nowhere", report_only=True)
    (tmp_path / "speed.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="holds no measurements of these models"):
        compare(configs_on(data), tmp_path, report_only=True)


MALFORMED = {
    "not JSON": b"{",
    "not UTF-8": b"\xff",
    "nested too deeply": b"[" * 100_000,
    "a number": b"3",
    "seconds that are a number": {"seconds": 3},
    "no training": {"seconds": {"prefill": [1.0]}},
    "no seconds": {"seconds": {"train": []}},
    "seconds that are text": {"seconds": {"train": ["1"]}},
    "zero seconds": {"seconds": {"train": [0]}},
    "too large for a float": {"compile_seconds": 10**400},
    "not a number": {"memory_bytes": float("nan")},
    "no device": {"device": None},
    "kernels that are a list": {"kernels": []},
    "a round that is text": {"round": "1"},
}


@pytest.mark.parametrize("damage", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_left_out(tmp_path, damage):
    """Its measurement is then taken again."""
    config = small_config()
    hashed = config_hash(config)
    measurement = {
        "model": "ours",
        "round": 0,
        "config_hash": hashed,
        "device": "cpu",
        "kernels": "xla",
        "seconds": {"train": [0.5]},
        "compile_seconds": 1.5,
        "memory_bytes": 3,
    }
    changed = {**measurement, "round": 1} | (damage if isinstance(damage, dict) else {})
    second = damage if isinstance(damage, bytes) else json.dumps(changed).encode()
    (tmp_path / "speed.jsonl").write_bytes(
        json.dumps(measurement).encode() + b"\n" + second + b"\n"
    )
    assert read_measurements(str(tmp_path), {"ours": config}, "cpu") == [measurement]


@pytest.mark.parametrize("value", ["12", [1.0], float("inf"), True])
def test_a_validation_loss_that_is_not_a_number_is_refused(data, whole, tmp_path, value):
    shutil.copy(whole / "speed.jsonl", tmp_path)
    (tmp_path / "llama").mkdir()
    row = {"step": 4, "tokens": 8, "validation_loss": 1.0, "validation_bits_per_byte": value}
    (tmp_path / "llama" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"llama': validation_bits_per_byte in .* must be a"):
        compare(configs_on(data), tmp_path, report_only=True)


@pytest.mark.parametrize("name", ["speed.jsonl", "results.json", "figure.png"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_in_place_of_its_files_are_left_alone(data, tmp_path, name, kind):
    """A link is not followed, and reading a pipe would hang."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    path = tmp_path / name
    path.symlink_to(mine) if kind == "link" else os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"{name}' must be a file that the run made"):
        compare(configs_on(data), tmp_path)
    assert mine.read_text() == "mine"


def test_an_interrupted_comparison_resumes(data, whole, tmp_path, monkeypatch, capsys):
    """A measurement that a kill truncated is taken again; a run that a signal stopped resumes."""
    configs = configs_on(data)
    lines = (whole / "speed.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "speed.jsonl").write_text("".join(lines[:2]) + lines[2][:40])
    measured = []
    time_programs = speed.time_programs

    def counting(programs, repeats):
        measured.append(programs.config.model.name)
        return time_programs(programs, repeats)

    monkeypatch.setattr(speed, "time_programs", counting)
    fit, calls = runs.fit, []

    def stopping(config, workdir, on_step):
        def stop(*arguments):
            calls.append(workdir)
            on_step(*arguments)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        return fit(config, workdir, stop)

    monkeypatch.setattr(runs, "fit", stopping)
    compare(configs, tmp_path)
    assert sorted(measured) == ["fac_split", "llama"]  # in the second round
    assert "Stopped. Run the same command again to continue." in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()
    compare(configs, tmp_path)
    assert len(measured) == 2
    found, expected = (json.loads((w / "results.json").read_text()) for w in (tmp_path, whole))
    for row, other in zip(found["models"], expected["models"], strict=True):
        assert row["validation_loss"] == other["validation_loss"]
    assert len(read_measurements(str(tmp_path), configs, "cpu")) == 4


def test_a_signal_while_a_run_is_scored(data, whole, tmp_path, monkeypatch, capsys):
    """The next start scores what is missing, and trains nothing."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("fac_split", "llama"):
        (tmp_path / name / scores.FILE).unlink()
    (tmp_path / "results.json").unlink()
    score, scored = scores.score, []

    def stopping(folder):
        scored.append(folder)
        if len(scored) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        score(folder)

    monkeypatch.setattr(scores, "score", stopping)
    compare(configs_on(data), tmp_path)
    assert "Stopped. Run the same command again to continue." in capsys.readouterr().out
    assert len(scored) == 1
    assert not (tmp_path / "results.json").exists()
    compare(configs_on(data), tmp_path)
    assert len(scored) == 3
    for name in ("fac_split", "llama"):
        before, after = ((w / name / scores.FILE).read_text() for w in (whole, tmp_path))
        assert json.loads(after) == pytest.approx(json.loads(before))


def test_more_seeds_add_runs(data, whole, tmp_path):
    """The run that is there is not trained again, and its result counts in the mean."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    configs = {"llama": configs_on(data)["llama"]}
    before = (tmp_path / "llama" / "metrics.jsonl").stat().st_mtime_ns
    compare(configs, tmp_path, dataclasses.replace(TRAINING, seeds=2))
    assert (tmp_path / "llama" / "metrics.jsonl").stat().st_mtime_ns == before
    results = json.loads((tmp_path / "results.json").read_text())
    found = [run["validation_bits_per_byte"] for run in results["runs"]]
    assert [run["name"] for run in results["runs"]] == ["llama", "llama_seed=1"]
    assert found[0] != found[1]
    (row,) = results["models"]
    assert row["validation_bits_per_byte"] == pytest.approx(sum(found) / 2)
    deviation = abs(found[0] - found[1]) / 2**0.5
    assert row["validation_bits_per_byte_deviation"] == pytest.approx(deviation)
    assert f"{sum(found) / 2:.4f} ± {deviation:.4f}" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_recall_texts_are_trained_and_scored(tmp_path, monkeypatch):
    """Bits per byte and the late loss are those of the corpus alone."""
    monkeypatch.setattr(training_data, "_RECALL_DOCUMENTS", 60)
    monkeypatch.setattr(scores, "_QUESTIONS", 8)
    (tmp_path / "text.txt").write_text("A text that is easily learned. " * 200)
    prepare(str(tmp_path / "text.txt"), "bytes", str(tmp_path / "set"), context=96)
    config = small_config(
        data={"path": str(tmp_path / "set")}, mesh={"data": 1}, model={"context": 96}
    )
    llama = small_baseline("llama", vocab_size=257, context=96)
    configs = {"llama": dataclasses.replace(config, model=llama)}
    training = Training(Budget("tokens", 3 * 8 * 96), recall=0.25)
    compare(configs, tmp_path / "out", training, rounds=1)
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    (scored,) = [r for r in read_rows(str(tmp_path / "out" / "llama")) if "validation_loss" in r]
    assert row["validation_loss"] == scored["validation_loss/corpus"] != scored["validation_loss"]
    expected = scored["validation_bits_per_byte/corpus"]
    assert row["validation_bits_per_byte"] == expected
    right = row["recall_accuracy"] * 16  # of 8 questions for each of two tasks
    assert right == pytest.approx(round(right))
    assert 0 <= right <= 16
    with pytest.raises(
        ValueError, match=r"the training data must be embedded with a share of 0\.25"
    ):
        compare(configs, tmp_path / "out", dataclasses.replace(training, recall=0.5), rounds=1)


def test_each_round_starts_with_another_model():
    assert missing_measurements("abc", 2, []) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")
    ]  # fmt: skip
    done = [{"round": 0, "model": "b"}]
    assert missing_measurements("abc", 1, done) == [(0, "a"), (0, "c")]


def test_the_hash_covers_what_speed_depends_on(data):
    config = configs_on(data)["llama"]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=99))
    assert config_hash(config) == config_hash(longer)
    for other in (
        dataclasses.replace(config, mesh=MeshConfig(data=8)),
        dataclasses.replace(config, train=dataclasses.replace(config.train, remat="full")),
        dataclasses.replace(config, model=dataclasses.replace(config.model, width=32)),
    ):
        assert config_hash(other) != config_hash(config), to_dict(other)


def test_measurements_of_another_recipe_are_left_out(data, whole):
    configs = configs_on(data)
    other = dataclasses.replace(configs["llama"], mesh=MeshConfig(data=2))
    assert len(read_measurements(str(whole), configs | {"llama": other}, "cpu")) == 2
    assert read_measurements(str(whole), configs, "NVIDIA H100") == []
