import dataclasses
import logging

import numpy as np
import pytest

from flowhn_jax.config import FlowHNConfig
from flowhn_jax.split import SplitConfig, make_plan, measured, plan
from flowhn_jax.split.cost import balanced_tokens
from flowhn_jax.split.measured import BranchTimes
from flowhn_jax.split.plan import with_fixed_share
from kernels import device_cache

DIMS = FlowHNConfig().dims


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWHN_CACHE_DIR", str(tmp_path))
    make_plan.cache_clear()
    plan._warn_unmeasured.cache_clear()
    yield
    make_plan.cache_clear()


def test_fit_finds_the_polynomials(rng):
    times = BranchTimes(tuple(rng.uniform(1e-4, 1e-3, 3) ** [1, 2, 3]), (2e-3, 3e-6))
    tokens = np.arange(128, 1025, 128)
    noise = rng.uniform(0.999, 1.001, (2, len(tokens)))
    fitted = measured.fit(
        tokens, times.attention_seconds(tokens) * noise[0], times.ssm_seconds(tokens) * noise[1]
    )
    for name in ("attention_seconds", "ssm_seconds"):
        exact, found = (getattr(t, name)(tokens) for t in (times, fitted))
        np.testing.assert_allclose(found, exact, rtol=2e-3)


def test_fit_has_the_least_relative_errors():
    """Compared with NumPy's solver, on times that no polynomial of the degree passes through."""
    tokens, attention, ssm = (
        np.arange(1.0, 6),
        np.array([1, 5, 6, 30, 31.0]),
        np.array([1, 2, 8, 9, 40.0]),
    )
    found = measured.fit(tokens, attention, ssm)
    for coefficients, seconds, degree in ((found.attention, attention, 2), (found.ssm, ssm, 1)):
        powers = np.vander(tokens, degree + 1, increasing=True)
        expected = np.linalg.lstsq(powers / seconds[:, None], np.ones(5))[0]
        np.testing.assert_allclose(coefficients, expected, rtol=1e-6)
        assert all(type(coefficient) is float for coefficient in coefficients)


def test_balance_is_where_the_times_meet(rng):
    times = BranchTimes((1e-4, 1e-6, 1e-9), (2e-4, 2e-6))
    tokens = times.balanced_tokens(1000)
    excess = [abs(times.attention_seconds(a) - times.ssm_seconds(1000 - a)) for a in range(1001)]
    assert tokens == int(np.argmin(excess))
    assert 0 < tokens < 1000


def test_each_branch_gets_a_token():
    assert BranchTimes((1.0, 0.0, 0.0), (0.0, 1e-9)).balanced_tokens(100) == 1
    cheap_attention = BranchTimes((0.0, 1e-9, 0.0), (1.0, 0.0))
    assert [cheap_attention.balanced_tokens(n) for n in (1, 2, 3, 100)] == [1, 1, 2, 99]


@pytest.mark.parametrize(
    "entry",
    [
        {"attention": None, "ssm": [1, 2]},
        {"ssm": [1, 2]},
        [],
        {"attention": [1, 2, 3], "ssm": ["a", "b"]},
        {"attention": [1, 2, 3], "ssm": [float("nan"), 1]},
    ],
)
def test_damaged_times_are_ignored(entry, caplog):
    device_cache.write("cpu", "branches", measured._key(DIMS), entry)
    assert measured.load("cpu", DIMS) is None
    assert "are damaged" in caplog.text


def test_times_are_saved_by_device_and_sizes(caplog):
    times, others = (
        BranchTimes((0.0, 1.0, 0.5), (2.0, 1.0)),
        BranchTimes((0.0, 2.0, 0.0), (0.0, 1.0)),
    )
    wider = dataclasses.replace(DIMS, width=DIMS.width + 1)
    measured.save("cpu", DIMS, times)
    measured.save("cpu", wider, others)
    assert (measured.load("cpu", DIMS), measured.load("cpu", wider)) == (times, others)
    assert measured.load("gpu", DIMS) is None
    assert not caplog.records


def test_a_measured_half_is_not_a_requested_half():
    split = SplitConfig("fac_split", balance="time")
    measured.save("cpu", DIMS, BranchTimes((0.0, 1.0, 0.0), (0.0, 1.0)))
    share = with_fixed_share(split, DIMS, 1024)
    expected = make_plan(split, DIMS, blocks=2, context=1024)
    assert make_plan(share, DIMS, blocks=2, context=1024) == expected
    assert expected.blocks[0].attention.count(1024) != 512


def test_the_planner_uses_the_measurements_of_this_device():
    split = SplitConfig("fa_split", balance="time", align=1)
    measured.save("cpu", DIMS, BranchTimes((0.0, 3.0, 0.0), (0.0, 1.0)))
    found = make_plan(split, DIMS, blocks=2, context=1000)
    assert found.blocks[0].attention.count(1000) == 250
    share = with_fixed_share(split, DIMS, 1000)
    assert share.balance == 0.25
    assert make_plan(share, DIMS, blocks=2, context=1000) == found


@pytest.mark.parametrize("balance", ["flops", "equal", 0.3])
def test_other_balances_need_no_measurements(balance, caplog):
    split = SplitConfig("fa_split", balance=balance, align=1)
    plans = [make_plan(split, DIMS, blocks=1, context=1000)]
    assert not caplog.records
    measured.save("cpu", DIMS, BranchTimes((0.0, 3.0, 0.0), (0.0, 1.0)))
    make_plan.cache_clear()
    plans.append(make_plan(split, DIMS, blocks=1, context=1000))
    assert plans[0] == plans[1]


def test_without_measurements_a_warning_is_logged(caplog):
    split = SplitConfig("fa_split", balance="time", align=1)
    measured.save("cpu", dataclasses.replace(DIMS, width=1), BranchTimes((0, 3, 0), (0, 1)))
    measured.save("NVIDIA H100", DIMS, BranchTimes((0, 3, 0), (0, 1)))
    with caplog.at_level(logging.WARNING):
        found = make_plan(split, DIMS, blocks=2, context=1000)
    assert found.blocks[0].attention.count(1000) == balanced_tokens(DIMS, 1000)
    assert (
        "were not measured on cpu: balancing by FLOPs. To measure, run `python -m flowhn_jax.bench"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("changed", "share"), [({"head_dim": 10**6}, 1 / 4), ({"inner": 10**6}, 3 / 4)]
)
def test_a_fixed_share_leaves_each_branch_a_token(changed, share):
    """Even if the balance by FLOPs gives one branch all tokens."""
    dims = dataclasses.replace(DIMS, **changed)
    assert balanced_tokens(dims, 4) == (0 if share < 0.5 else 4)
    assert with_fixed_share(SplitConfig(balance="time"), dims, 4).balance == share


@pytest.mark.parametrize("strategy", ["fa_split", "fac_split", "fai_split"])
@pytest.mark.parametrize("context", [24, 1000, 1024])
def test_a_fixed_share_keeps_the_plan(strategy, context):
    split = SplitConfig(strategy, balance="time")
    kept = with_fixed_share(split, DIMS, context)
    assert isinstance(kept.balance, float)
    plans = [make_plan(s, DIMS, blocks=3, context=context) for s in (split, kept)]
    assert plans[0] == plans[1]
    assert with_fixed_share(kept, DIMS, context) is kept
