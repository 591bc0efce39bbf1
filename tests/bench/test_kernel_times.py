import json

import jax
import numpy as np
import pytest

from flowhn_jax.bench import case as case_lib
from flowhn_jax.bench import cases as cases_lib
from flowhn_jax.bench import kernel_times, peers, sampled_reference
from flowhn_jax.bench.device import LeastWork, MeasuredRates

SIZES = {  # of each case below, in the order of its builder's arguments
    "selective_scan": (2, 33, 20, 4),
    "ssd": (2, 70, 2, 8),
    "attention": (2, 70, 4, 2, 8),
    "cross_entropy": (90, 12, 50),
    "causal_conv": (2, 33, 20, 4),
}


def small_case(operation, dtype="float32", **options):
    builder = getattr(case_lib, f"{operation}_case")
    return builder("small", *SIZES[operation], dtype, **options)


@pytest.mark.parametrize(
    ("operation", "options"),
    [*((name, {}) for name in cases_lib.OPERATION_NAMES), ("attention", {"documents": True})],
)
def test_errors_are_small_for_correct_results_and_large_for_wrong_ones(operation, options):
    """Gradients are expected of every floating-point input."""
    case = small_case(operation, **options)
    run = jax.jit(lambda inputs: case.run(**inputs, backend=None))
    floats = {k: x for k, x in case.inputs.items() if np.issubdtype(x.dtype, np.floating)}
    output, vjp = jax.vjp(lambda floats: run(case.inputs | floats), floats)
    gradients = vjp(case.sampled_cotangent)[0]
    assert case.output_error(output) < 1e-5
    assert case.gradient_error(gradients) < 1e-4
    assert case.output_error(1.01 * output) > 5e-3
    for name in floats:
        assert case.gradient_error(gradients | {name: 1.01 * gradients[name]}) > 5e-3, name


def test_the_reference_has_the_gradients_of_finite_differences(rng):
    args = dict(zip(("u", "dt", "z"), rng.standard_normal((3, 6, 2)), strict=True))
    args |= dict(zip("BC", rng.standard_normal((2, 6, 3)), strict=True))
    args |= dict(zip(("D", "dt_bias"), rng.standard_normal((2, 2)), strict=True))
    args |= {"A": -np.exp(rng.standard_normal((2, 3)))}
    dy = rng.standard_normal((6, 2))
    _, gradients = sampled_reference.selective_scan(**args, dy=dy)
    assert gradients.keys() == args.keys()
    for name, x in args.items():
        for index in np.ndindex(x.shape):
            losses = []
            for step in (1e-6, -1e-6):
                moved = x.copy()
                moved[index] += step
                y, _ = sampled_reference.selective_scan(**args | {name: moved}, dy=dy)
                losses.append((y * dy).sum())
            slope = (losses[0] - losses[1]) / 2e-6
            np.testing.assert_allclose(gradients[name][index], slope, rtol=1e-5, atol=1e-7)


def test_the_floor_is_the_slowest_of_the_three():
    rates = MeasuredRates(bytes_per_second=10.0, matmul_flops_per_second=100.0, exps_per_second=1.0)
    assert LeastWork(bytes=20, matmul_flops=100, exps=1).floor_seconds(rates) == 2
    assert LeastWork(bytes=1, matmul_flops=300, exps=1).floor_seconds(rates) == 3
    assert LeastWork(bytes=1, matmul_flops=1, exps=4).floor_seconds(rates) == 4


def test_work_of_the_scan():
    case = small_case("selective_scan", "bfloat16")
    tokens, weights = 2 * 33 * 20, 20 * 4 + 20 + 20
    projected = 2 * 2 * 33 * 4 * 4  # B and C, float32
    inputs = tokens * (2 + 4 + 2) + 4 * weights + projected
    assert case.forward.bytes == inputs + 2 * tokens
    assert case.both.bytes == 2 * case.forward.bytes + inputs
    assert case.both.exps == 2 * case.forward.exps == 2 * tokens * 4


@pytest.fixture
def small_cases(monkeypatch):
    monkeypatch.setattr(kernel_times, "measure_rates", lambda dtype: MeasuredRates(1e9, 1e9, 1e9))

    def only(*operations):
        found = [small_case(operation) for operation in operations]
        monkeypatch.setattr(cases_lib, "cases", lambda *_: iter(found))

    return only


def bench(tmp_path, **options):
    options = {"tokens": 1, "dtype": "float32", "repeats": 2, "with_peers": False} | options
    options = {"backends": [], "out": str(tmp_path / "out.json")} | options
    return kernel_times.bench_kernels([], [], [], **options)


def test_a_row_for_each_backend_and_peer(small_cases, tmp_path, capsys):
    small_cases("selective_scan", "causal_conv")
    rows = bench(tmp_path, with_peers=True)
    names = [row["backend"] for row in rows]
    ours = ["xla_associative", "xla_sequential"]
    assert names[:3] == [*ours, "jax.lax.associative_scan"]
    assert names[-1] == "xla"
    for row in rows[:3]:
        assert row["forward_error"] < 1e-5
        assert 0 < row["forward_ms_min"] <= row["forward_ms"] <= row["forward_ms_max"]
        assert row["both_ratio"] == pytest.approx(row["both_ms"] / row["both_floor_ms"])
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["rows"] == rows
    assert document["jax"] == jax.__version__
    printed = capsys.readouterr().out
    assert "xla_sequential" in printed
    assert "temp MiB" in printed


def test_only_named_backends_are_measured(small_cases, tmp_path):
    small_cases("selective_scan", "causal_conv")
    rows = bench(tmp_path, backends=["xla_associative"])
    assert [row["backend"] for row in rows] == ["xla_associative"]


def test_a_failure_is_reported_and_the_others_continue(small_cases, tmp_path, capsys, monkeypatch):
    def broken(case):
        raise RuntimeError("no such device\nat all")

    candidate = peers._Candidate("jax", broken)
    monkeypatch.setitem(peers._CANDIDATES, "causal_conv", (candidate,))
    small_cases("causal_conv")
    rows = bench(tmp_path, with_peers=True)
    assert rows[1]["failed"] == "RuntimeError: no such device"
    assert "failed: RuntimeError: no such device" in capsys.readouterr().out


def test_cases_fill_a_batch_of_tokens():
    found = list(
        cases_lib.cases(["causal_conv", "cross_entropy"], ["135m"], [16, 128], 64, "float32")
    )
    assert [case.shape for case in found] == [
        "B=4 L=16 E=1536 W=4",
        "B=1 L=128 E=1536 W=4",
        "N=64 D=768 V=65536",
    ]
