"""Part `accuracy`: correct kernels pass, and wrong ones of every kind are found."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from flowhn_jax.bench.suite import accuracy
from kernels.backends import CannotServeError
from kernels.operations import OPERATIONS


def keys(*names):
    return [key for key in accuracy.plan() if key.startswith(names)]


def test_every_operation_is_planned_in_both_dtypes():
    planned = accuracy.plan()
    assert len(set(planned)) == len(planned)
    found = {tuple(key.rsplit("/", 2)) for key in planned}
    for name in accuracy.CHECKS:
        backends = {backend for check, backend, _ in found if check == name}
        assert backends
        assert {(name, b, d) for b in backends for d in accuracy.TOLERANCES} <= found
    operations = {key.partition("/")[0] for key in planned}
    assert operations >= {*OPERATIONS, "cross_entropy", "causal_conv"}


def test_correct_kernels_pass():
    planned = keys("causal_conv/", "attention_step/")
    assert len(planned) == 6
    found = list(accuracy.measure(planned, {}))
    assert [row["key"] for row in found] == planned
    for row in found:
        assert row["right"], row
        assert row["summary"] == "right"
        assert 0 < row["error"] < row["tolerance"]
        assert row["key"] == f"{row['check']}/{row['backend']}/{row['dtype']}"
        if row["check"].startswith("causal_conv"):
            assert 0 < row["gradient_error"] < row["tolerance"]
            assert row["worst_gradient"] in ("x", "weight", "bias", "initial_state")
        else:
            assert row["gradient_error"] is row["worst_gradient"] is None


@pytest.fixture
def measure_wrong(monkeypatch):
    """Return a function that measures a check in float32 after changing its results."""

    def measure(change, check="causal_conv/plain"):
        right = accuracy.CHECKS[check]
        wrong = dataclasses.replace(right, run=functools.partial(changed, right.run, change))
        monkeypatch.setitem(accuracy.CHECKS, check, wrong)
        (row,) = accuracy.measure([f"{check}/xla/float32"], {})
        return row

    return measure


def changed(run, change, **arrays):
    return change(run(**arrays))


def test_a_kernel_that_is_off_by_a_percent_is_wrong(measure_wrong):
    row = measure_wrong(lambda outputs: jax.tree.map(lambda y: 1.01 * y, outputs))
    assert row["right"] is False
    assert row["summary"] == "WRONG"
    assert row["error"] == pytest.approx(0.01, rel=0.05)
    assert row["gradient_error"] == pytest.approx(0.01, rel=0.05)


def test_a_step_that_is_off_by_a_percent_is_wrong(measure_wrong):
    row = measure_wrong(lambda y: 1.01 * y, "attention_step/plain")
    assert row["right"] is False
    assert row["error"] == pytest.approx(0.01, rel=0.05)


def test_nan_in_one_place_is_wrong(measure_wrong):
    row = measure_wrong(lambda outputs: (outputs[0].at[1, 70, 3].set(jnp.nan), outputs[1]))
    assert row["right"] is False
    assert row["error"] != row["error"]


def test_a_final_state_that_is_wrong(measure_wrong):
    row = measure_wrong(lambda outputs: (outputs[0], outputs[1] + 1))
    assert row["right"] is False
    assert row["error"] > 0.1
    assert row["gradient_error"] < 1e-4


def test_gradients_that_are_wrong_where_values_are_right(measure_wrong):
    """The gradient of a value is stopped for a third of the channels."""

    def stop(outputs):
        y, state = outputs
        return y.at[..., :13].set(jax.lax.stop_gradient(y[..., :13])), state

    row = measure_wrong(stop)
    assert row["right"] is False
    assert row["error"] < 1e-4
    assert row["gradient_error"] > 0.1
    assert row["worst_gradient"] in ("x", "weight", "bias")


def test_gradients_that_are_nan(measure_wrong):
    @jax.custom_vjp
    def wrong(y):
        return y

    wrong.defvjp(lambda y: (y, None), lambda _, dy: (jnp.full_like(dy, jnp.nan),))
    row = measure_wrong(lambda outputs: (wrong(outputs[0]), outputs[1]))
    assert row["right"] is False
    assert row["error"] < 1e-4
    assert row["gradient_error"] != row["gradient_error"]


def test_a_backend_that_does_not_support_the_arguments_is_not_a_failure(monkeypatch):
    def refuse(**arrays):
        raise CannotServeError("causal_conv: backend 'xla' cannot serve: no state")

    check = dataclasses.replace(accuracy.CHECKS["causal_conv/plain"], run=refuse)
    monkeypatch.setitem(accuracy.CHECKS, "causal_conv/plain", check)
    (row,) = accuracy.measure(["causal_conv/plain/xla/float32"], {})
    assert row["unserved"] == "causal_conv: backend 'xla' cannot serve: no state"
    assert not {"failed", "right", "partial"} & row.keys()


def test_a_kernel_that_does_not_compile_costs_one_row(monkeypatch):
    def refuse(**arrays):
        raise ValueError("no such shape")

    check = dataclasses.replace(accuracy.CHECKS["causal_conv/plain"], run=refuse)
    monkeypatch.setitem(accuracy.CHECKS, "causal_conv/plain", check)
    failed, right = accuracy.measure(
        ["causal_conv/plain/xla/float32", "attention_step/plain/xla/float32"], {}
    )
    assert failed["failed"] == "ValueError: no such shape"
    assert "right" not in failed
    assert right["right"]
