"""Programs of the suite, compiled for absent hardware."""

import jax
import pytest

from flowhn_jax.bench.suite import page, rehearsal
from flowhn_jax.bench.suite.document import Document
from flowhn_jax.bench.suite.workload import MODELS
from tests.aot import cuda_target, tpu_target

pytestmark = pytest.mark.aot

BACKENDS = {"gpu:h100x1": "triton", "v5e:1x1": "pallas_tpu"}


@pytest.fixture(params=BACKENDS)
def target(request, monkeypatch):
    """Yield a topology set in the worker's environment; skip the test without its compiler."""
    if request.param.startswith("gpu"):
        cuda_target.h100_mesh(data=1)
        cuda_target.needs_cudnn()
        pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    else:
        tpu_target.devices("v5e:1x1")
    for name, value in rehearsal.part(request.param).environment.items():
        if name.startswith("FLOWHN"):
            monkeypatch.setenv(name, value)
    uses_cache = jax.config.jax_enable_compilation_cache
    yield request.param
    jax.config.update("jax_enable_compilation_cache", uses_cache)


def test_every_kind_of_program_is_planned(target):
    planned = rehearsal.plan()
    assert len(set(planned)) == len(planned)
    kinds = {key.partition("/")[0] for key in planned}
    assert kinds == {"training", "accuracy", "inference", "learning"}
    sizes = {key.split("/")[1] for key in planned if key.startswith("training/")}
    assert sizes == {"135m", "350m", "1b"}
    for model in MODELS:
        assert {f"training/{size}/{model}" for size in sizes} <= set(planned)
        assert f"inference/135m/{model}" in planned
    assert planned[0].startswith("training/135m/")
    scans = [key.split("/") for key in planned if key.startswith("accuracy/selective_scan/")]
    assert BACKENDS[target] in {scan[3] for scan in scans}
    assert not set(BACKENDS.values()) - {BACKENDS[target]} & {scan[3] for scan in scans}
    assert {scan[4] for scan in scans} == {"float32", "bfloat16"}


def test_the_machine_is_the_target(target):
    described = rehearsal.describe()
    assert described["device"] == target
    assert described["devices"] == 1
    assert "jax" in described["packages"]


def test_a_check_is_compiled(target, tmp_path):
    key = f"accuracy/selective_scan/plain/{BACKENDS[target]}/bfloat16"
    assert key in rehearsal.plan()
    (row,) = rehearsal.measure([key], {})
    assert "failed" not in row, row
    assert row["seconds"] > 0
    assert 2**10 < row["memory_bytes"] < 2**28
    assert row["kernels"] == f"selective_scan {BACKENDS[target]}"
    document = Document(tmp_path)
    document.part("rehearsal")["rows"] = [row]
    assert f"| {key} |" in page.render(document, [rehearsal.part(target)], ())


def test_a_program_that_does_not_compile_costs_one_row(target, monkeypatch):
    def refuse(key, place):
        raise ValueError("no such kernel\nin this version")

    monkeypatch.setattr(rehearsal.accuracy, "lowered", refuse)
    (row,) = rehearsal.measure(["accuracy/ssd/plain/xla/float32"], {})
    assert row == {
        "key": "accuracy/ssd/plain/xla/float32",
        "failed": "ValueError: no such kernel",
    }
