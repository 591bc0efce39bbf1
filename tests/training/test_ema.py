"""The average of the parameters: trained, saved, validated, read."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from flowhn_jax.checkpoints.optimizer import make_optimizer
from flowhn_jax.checkpoints.parameters import find_step, load_params
from flowhn_jax.checkpoints.state import init_state, state_shardings
from flowhn_jax.config import MeshConfig
from flowhn_jax.evaluation.evaluate import evaluate
from flowhn_jax.interop.transfer import export_run
from flowhn_jax.parallel.mesh import make_mesh, shard_batch
from flowhn_jax.training.metrics import read_rows
from flowhn_jax.training.step import make_train_step
from flowhn_jax.training.trainer import fit
from tests.small import small_config
from tests.training.test_step import padded_batch
from tests.training.test_trainer import data, run_config  # noqa: F401

DECAY = 0.7


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):  # noqa: F811
    """Train four steps with checkpoints and validations of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("runs") / "ema"
    config = run_config(data, steps=4, ema=DECAY, eval_every=2, checkpoint_every=2)
    fit(config, str(workdir))
    return workdir, config


def test_the_average_has_weights_that_decay_with_age():
    """Compared with float64, over the parameters after each step; a bad step counts not at all."""
    config = small_config("no_split", model={"blocks": 1}, train={"ema": DECAY, "warmup": 0.0})
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), 8)
    step = make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        state = init_state(config, mesh)
        seen = []
        for number in range(4):
            state, _ = step(state, shard_batch(padded_batch(config, number), mesh))
            seen.append(jax.device_get(state.params))
        before = jax.device_get(state.ema)
        poison = jax.jit(lambda params: jax.tree.map(lambda x: x * np.nan, params))
        bad = dataclasses.replace(state, params=poison(state.params))
        state, metrics = step(bad, shard_batch(padded_batch(config), mesh))
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.ema))
    assert jax.tree.map(lambda x: x.sharding, state.ema) == state_shardings(config, mesh).params
    weights = DECAY ** np.arange(len(seen))[::-1]
    expected = jax.tree.map(
        lambda *each: np.tensordot(weights / weights.sum(), np.float64(each), 1), *seen
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), state.ema, expected
    )


def test_rows_hold_the_losses_of_both(run):
    rows = read_rows(run[0])
    assert [row["step"] for row in rows if "validation_ema_loss" in row] == [2, 4]
    assert rows[-1]["validation_ema_loss"] != rows[-1]["validation_loss"]


def nll_of(run, capsys, **options):
    workdir, config = run
    evaluate(config, str(workdir), "perplexity", **options)
    return json.loads(capsys.readouterr().out.splitlines()[-1])["nll"]


def test_eval_and_export_read_the_one_asked_for(run, tmp_path, capsys):
    workdir, config = run
    assert nll_of(run, capsys) != nll_of(run, capsys, ema=True)
    texts = []
    for ema in (False, True):
        out = tmp_path / str(ema)
        export_run(str(workdir), str(out), ema=ema)
        texts.append((out / "model.safetensors").read_bytes())
        row = read_rows(workdir)[-1]
        bits = row["validation_ema_bits_per_byte" if ema else "validation_bits_per_byte"]
        assert f"{bits:.4f} bits per byte" in (out / "README.md").read_text()
    assert texts[0] != texts[1]
    with pytest.raises(ValueError, match="--ema cannot be used with --mode=throughput"):
        evaluate(config, None, "throughput", ema=True, benchmarks={"throughput": lambda *_: {}})


def test_the_best_is_that_of_the_loss_asked_for(data, tmp_path):  # noqa: F811
    """At such a rate the average is best later than the parameters are."""
    keys = dict(checkpoint_every=2, eval_every=2, keep_checkpoints=1, clip_norm=0.0, warmup=0.0)
    config = run_config(data, steps=12, ema=0.9, learning_rate=0.3, schedule="constant", **keys)
    fit(config, str(tmp_path))
    rows = read_rows(tmp_path)
    best = {}
    for ema, name in ((False, "validation_loss"), (True, "validation_ema_loss")):
        best[ema] = min(rows, key=lambda row: row[name])["step"]
        assert find_step(str(tmp_path), "best", ema) == best[ema]
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {12, *best.values()}


def test_a_run_with_an_average_resumes_bit_for_bit(data, run, tmp_path):  # noqa: F811
    workdir, config = run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    fit(config, str(tmp_path / "run"))
    mesh = make_mesh(config.mesh, 8)
    found, expected = (
        load_params(str(each), config.model, mesh, ema=True) for each in (tmp_path / "run", workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_average_begins_with_the_parameters_of_a_run_without(data, tmp_path, capsys):  # noqa: F811
    keys = dict(eval_every=2, checkpoint_every=1)
    fit(run_config(data, steps=2, **keys), str(tmp_path))
    mesh = make_mesh(run_config(data).mesh, 8)
    model = run_config(data).model
    with pytest.raises(FileNotFoundError, match=r"--ema needs an average .* step 2 .* has none"):
        load_params(str(tmp_path), model, mesh, ema=True)
    fit(run_config(data, steps=3, ema=DECAY, **keys), str(tmp_path))
    assert "the checkpoint of step 2 has no average" in capsys.readouterr().err
    before, after = (load_params(str(tmp_path), model, mesh, step) for step in ("2", "3"))
    average = load_params(str(tmp_path), model, mesh, "3", ema=True)
    share = (1 - DECAY) / (1 - DECAY**3)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, (1 - share) * b + share * c, atol=1e-6),
        average,
        before,
        after,
    )
    fit(run_config(data, steps=4, **keys), str(tmp_path))  # without again
    assert not (tmp_path / "checkpoints/4/ema").exists()


def test_without_one_the_state_is_as_before():
    config = small_config()
    mesh = make_mesh(config.mesh, 8)
    state = init_state(config, mesh)
    assert state.ema is None
    optimizer = make_optimizer(config.train)
    leaves = len(jax.tree.leaves((state.params, optimizer.init(state.params)))) + 3
    assert len(jax.tree.leaves(state)) == leaves
