"""The files that the benchmarks write, and that they check before they measure."""

import json
import os

import jax
import pytest

from flowhn_jax.bench import (
    branch_parallel,
    branch_times,
    checkpoint_cost,
    decode,
    kernel_times,
    output,
    peer_models,
)
from tests.small import small_config


def test_results_have_the_device_and_the_version(tmp_path, capsys):
    path = tmp_path / "out.json"
    found = output.write_results(str(path), {"rows": [1.5]})
    assert found == {"device": "cpu", "jax": jax.__version__, "rows": [1.5]}
    assert json.loads(path.read_text()) == found
    assert capsys.readouterr().out == f"wrote {path}\n"


def test_a_check_changes_no_files(tmp_path):
    existing = tmp_path / "existing.json"
    existing.write_text("earlier results")
    output.check_out(str(existing))
    output.check_out(str(tmp_path / "new.json"))
    assert existing.read_text() == "earlier results"
    assert [path.name for path in tmp_path.iterdir()] == ["existing.json"]


def test_paths_that_cannot_be_written_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("", ".", "no_such_folder/out.json", "pipe"):
        path = tmp_path / name if name else ""
        with pytest.raises(ValueError, match="--out must be a file that can be written"):
            output.check_out(str(path))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_rejected(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"--out must be .*Permission denied"):
        output.check_out(str(tmp_path / "out.json"))


def measured(*_, **__):
    raise AssertionError("it must check --out before it measures")


def bench_kernels(config, *, repeats, out):
    settings = {"tokens": 1, "dtype": "float32", "repeats": repeats, "with_peers": False}
    kernel_times.bench_kernels(["causal_conv"], ["135m"], [16], [], out=out, **settings)


def bench_models(config, *, repeats, out):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer_models.bench_models(repeats=repeats, out=out)


@pytest.mark.parametrize(
    ("module", "first_step", "run"),
    [
        (branch_times, "_seconds", branch_times.bench_branches),
        (branch_parallel, "_block", branch_parallel.bench_parallel),
        (checkpoint_cost, "open_data", checkpoint_cost.bench_checkpoint),
        (decode, "_seconds_per_step", decode.bench_decode),
        (kernel_times, "measure_rates", bench_kernels),
        (peer_models, "_steps", bench_models),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_out_is_checked_before_measuring(monkeypatch, tmp_path, module, first_step, run):
    monkeypatch.setattr(module, first_step, measured)
    config = small_config("fac_split", model={"context": 512}, mesh={"data": 1})
    with pytest.raises(ValueError, match=r"--out must be .*no_such_folder"):
        run(config, repeats=1, out=str(tmp_path / "no_such_folder" / "out.json"))
