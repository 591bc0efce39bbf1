import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax import flops, models
from flowhn_jax.bench import throughput
from flowhn_jax.checkpoints.parameters import load_params
from flowhn_jax.config import DataConfig
from flowhn_jax.data.open import open_data
from flowhn_jax.data.prepare import prepare
from flowhn_jax.data.tokenizer import load_tokenizer
from flowhn_jax.evaluation import evaluate as evaluation
from flowhn_jax.evaluation import perplexity
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.trainer import fit
from tests.small import small_baseline, small_config

TEXT = pathlib.Path(__file__).read_bytes()[:1001] + "é€".encode()

BENCHMARKS = {"throughput": throughput.measure}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a small run of two training steps, and its config."""
    root = tmp_path_factory.mktemp("evaluation")
    (root / "text.txt").write_bytes(TEXT)
    prepare(str(root / "text.txt"), "bytes", str(root / "set"), context=24)
    config = small_config(
        "fac_split",
        train={"steps": 2, "batch_size": 4},
        data={"path": str(root / "set")},
        mesh={"data": 2},
    )
    fit(config, str(root / "run"))
    return root, config


def float64_nll(config, params, tokens, starts, scored_from):
    """Return the sum of -log p over the targets, from full logits in float64."""
    total = 0.0
    for start, first in zip(starts, scored_from, strict=True):
        window = tokens[start : start + config.context + 1]
        logits = models.forward(config, params, window[None, :-1].astype(np.int32))
        logits = np.asarray(logits, np.float64)[0]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        log_z += logits.max(-1)
        nll = log_z - np.take_along_axis(logits, window[1:, None], axis=1)[:, 0]
        total += nll[first - start :].sum()
    return total


@pytest.mark.parametrize("stride", [pytest.param(24, marks=pytest.mark.slow), 7])
def test_text_perplexity_is_the_float64_mean(trained, stride, capsys):
    root, config = trained
    evaluation.evaluate(
        config, str(root / "run"), "perplexity", data=str(root / "text.txt"), stride=stride
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    params = load_params(str(root / "run"), config.model, make_mesh(config.mesh, 4))
    tokens = np.concatenate([[256], load_tokenizer("bytes").encode(TEXT)])
    starts = [0]
    while starts[-1] + 24 < len(TEXT):
        starts.append(starts[-1] + stride)
    scored_from = [0] + [start + 24 for start in starts[:-1]]
    expected = float64_nll(config.model, params, tokens, starts, scored_from)

    assert result["tokens"] == result["bytes"] == len(TEXT)
    assert result["stride"] == stride
    assert result["nll"] == pytest.approx(expected / len(TEXT), abs=1e-6)
    bits = expected / math.log(2) / len(TEXT)
    assert result["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected / len(TEXT)), rel=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_the_whole_validation_set_is_scored(trained, capsys, named):
    """The run's own data are used if the config names none."""
    root, config = trained
    if not named:
        config = dataclasses.replace(config, data=DataConfig())
    evaluation.evaluate(config, str(root / "run"), "perplexity")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    index = json.loads((root / "set" / "index.json").read_text())["splits"]["validation"]
    assert result["tokens"] == index["tokens"]
    assert result["bytes"] == index["bytes"]
    assert 0 < result["bits_per_byte"] < 20


@pytest.mark.parametrize("max_windows", [None, 1, 3])
def test_validation_batches_are_counted(trained, max_windows):
    root, config = trained
    prepared, mesh = open_data(config, str(root / "run")).main, make_mesh(config.mesh, 4)
    batches = list(perplexity.validation(config, mesh, prepared, max_windows))
    assert len(batches) == perplexity.count_validation_batches(config, prepared, max_windows)


@given(
    targets=st.integers(1, 100),
    context=st.integers(1, 20),
    batch_size=st.integers(1, 4),
    data=st.data(),
)
def test_windows_score_each_target_once(targets, context, batch_size, data):
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(targets + 1)
    scored, batches = [], perplexity.TextBatches(tokens, context, stride, batch_size)
    assert len(batches) == len(list(batches))
    for batch in batches:
        assert batch["tokens"].shape == batch["segment_ids"].shape == (batch_size, context + 1)
        chosen = batch["weights"] == 1
        scored.extend(batch["tokens"][:, 1:][chosen])
        np.testing.assert_array_equal(
            batch["tokens"][:, 1:][chosen], batch["tokens"][:, :-1][chosen] + 1
        )
    assert scored == list(range(1, targets + 1))


def test_smaller_strides_give_longer_pasts():
    windows = list(perplexity.TextBatches(np.arange(41), 16, 4, 1))
    pasts = [np.argmax(window["weights"][0]) for window in windows]
    assert pasts == [0] + [12] * 6


def test_quality_of_known_sums():
    quality = perplexity.Quality(nll=math.log(2), tokens=10, bytes=5)
    assert quality.perplexity == pytest.approx(2)
    assert quality.bits_per_byte == pytest.approx(2)
    assert perplexity.Quality(nll=1e4, tokens=1, bytes=1).perplexity == math.inf


def test_errors_say_what_an_option_must_be(trained, tmp_path):
    root, config = trained
    workdir = str(root / "run")
    with pytest.raises(ValueError, match="--stride needs --data=FILE"):
        evaluation.evaluate(config, workdir, "perplexity", stride=3)
    with pytest.raises(
        ValueError, match=r"--data is an option of --mode=perplexity; .* --mode=throughput"
    ):
        evaluation.evaluate(
            config,
            None,
            "throughput",
            data="text.txt",
            benchmarks=BENCHMARKS,
        )
    with pytest.raises(ValueError, match="needs --workdir"):
        evaluation.evaluate(config, None, "perplexity")
    with pytest.raises(FileNotFoundError, match="must be the folder of a run"):
        evaluation.evaluate(config, str(tmp_path), "perplexity")
    with pytest.raises(
        FileNotFoundError, match=r"--data must be a text file .*'nowhere.txt' is neither"
    ):
        evaluation.evaluate(config, workdir, "perplexity", data="nowhere.txt")
    with pytest.raises(ValueError, match="--stride must be 1 to the context, 24; got 25"):
        evaluation.evaluate(config, workdir, "perplexity", data=str(root / "text.txt"), stride=25)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="must not be empty"):
        evaluation.evaluate(config, workdir, "perplexity", data=str(tmp_path / "empty.txt"))
    other = small_config("ae_split", data={"path": str(root / "set")})
    with pytest.raises(ValueError, match=r"another model than --config: model.split.strategy"):
        evaluation.evaluate(other, workdir, "perplexity")


def test_throughput(trained, capsys):
    _, config = trained
    evaluation.evaluate(config, None, "throughput", repeats=3, benchmarks=BENCHMARKS)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = config.train.batch_size * config.model.context
    for name in ("train", "prefill"):
        seconds = result[f"{name}_seconds"]
        assert result[f"{name}_seconds_min"] <= seconds <= result[f"{name}_seconds_max"]
        assert result[f"{name}_tokens_per_second"] == pytest.approx(tokens / seconds)
        assert result[f"{name}_mfu"] is None
    for name, count in (("decode", config.train.batch_size), ("decode_one", 1)):
        seconds = result[f"{name}_seconds"]
        assert result[f"{name}_tokens_per_second"] == pytest.approx(count / seconds)
        moved = flops.decode_bytes(config.model, count, config.model.context) / 2
        found = result[f"{name}_gigabytes_per_second_per_device"]
        assert found == pytest.approx(moved / seconds / 1e9)
        assert result[f"{name}_bandwidth_utilisation"] is None
    assert result["time_to_first_token"] == result["prefill_one_seconds"]
    assert result["devices"] == 2
    assert result["parameters"] == models.param_count(config.model)
    assert jax.devices()[0].device_kind == result["device"]


def test_throughput_of_a_baseline(capsys):
    config = small_config(train={"batch_size": 2}, mesh={"data": 1})
    config = dataclasses.replace(config, model=small_baseline("llama", blocks=2))
    evaluation.evaluate(config, None, "throughput", repeats=2, benchmarks=BENCHMARKS)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["model"] == "llama"
    assert result["decode_tokens_per_second"] == pytest.approx(2 / result["decode_seconds"])
