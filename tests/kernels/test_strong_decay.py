"""Gradients of A and dt are exact from weak to strong decay, for every backend."""

from functools import partial

import jax
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels.selective_scan import pallas_tpu, selective_scan, triton
from kernels.ssd import pallas_tpu as ssd_pallas_tpu
from kernels.ssd import ssd
from kernels.ssd import triton as ssd_triton
from tests.kernels import triton_interpreter
from tests.kernels.reference import assert_close
from tests.kernels.scans import scan_inputs
from tests.kernels.test_sequence import over
from tests.kernels.test_ssd import ssd_inputs
from tests.kernels.triton_checks import needs_triton

EXPONENTS = [0.01, 0.1, 1, 4, 8, 16, 30]  # -delta * A
DELTA = 0.5


def scan_arguments(rng, exponent, length):
    """Return four channels with three states each, all with about the same decay."""
    args = {name: rng.standard_normal((2, length, 4)) for name in ("u", "dt")}
    args |= {name: rng.standard_normal((2, length, 3)) for name in ("B", "C")}
    A = -exponent / DELTA * rng.uniform(0.98, 1, (4, 3))
    return as_float32(args | {"A": A, "D": rng.standard_normal(4)})


def ssd_arguments(rng, exponent, length):
    """Return four heads in two groups, all with about the same decay."""
    args = {"x": rng.standard_normal((2, length, 4, 3)), "dt": np.zeros((2, length, 4))}
    args |= {name: rng.standard_normal((2, length, 2, 5)) for name in ("B", "C")}
    A = -exponent / DELTA * rng.uniform(0.98, 1, 4)
    return as_float32(args | {"A": A, "D": rng.standard_normal(4)})


def as_float32(args):
    args = {name: np.asarray(x, np.float32) for name, x in args.items()}
    return args | {"dt": np.full_like(args["dt"], np.log(np.expm1(DELTA)))}


def run_pallas(**args):
    return pallas_tpu.selective_scan(scan_inputs(args), interpret=True)


def run_triton(**args):
    tile = triton.Tile(tokens=8, channels=32, warps=2)
    return triton.scan_with(triton_interpreter.run, tile, scan_inputs(args))


def run_ssd_pallas(**args):
    return ssd_pallas_tpu.ssd(ssd_inputs(args), interpret=True)


def run_ssd_triton(**args):
    run = partial(triton_interpreter.run, module="kernels.ssd.triton_kernels")
    return ssd_triton.ssd_with(run, ssd_triton.Tile(tokens=16, warps=4), ssd_inputs(args))


def scan(backend):
    return partial(selective_scan, return_final_state=True, backend=backend)


RUNS = {
    "xla_sequential": (scan("xla_sequential"), scan_arguments, 150, {}),
    "xla_associative": (scan("xla_associative"), scan_arguments, 150, {}),
    "pallas_tpu": (run_pallas, scan_arguments, 40, {}),
    "triton": (run_triton, scan_arguments, 19, {}),
    "scan_over_sequence": (scan(None), scan_arguments, 96, {"sequence": 4}),
    "ssd": (partial(ssd, return_final_state=True), ssd_arguments, 200, {}),
    "ssd_pallas_tpu": (run_ssd_pallas, ssd_arguments, 200, {}),
    "ssd_triton": (run_ssd_triton, ssd_arguments, 40, {}),
    "ssd_over_sequence": (
        partial(ssd, return_final_state=True),
        ssd_arguments,
        200,
        {"sequence": 4},
    ),
}

SLOW = "xla_associative", "scan_over_sequence", "ssd_over_sequence"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=needs_triton if "triton" in name else pytest.mark.slow if name in SLOW else (),
        )
        for name in RUNS
    ],
)
def test_gradients_of_decays_are_those_of_float64(name, rng):
    run, arguments, length, axes = RUNS[name]
    formula = formulas.ssd if "ssd" in name else formulas.selective_scan

    @jax.jit
    def gradients(args, cotangents):
        vjp = jax.vjp(lambda A, dt: run(**args | {"A": A, "dt": dt}), args["A"], args["dt"])[1]
        return dict(zip(("A", "dt"), vjp(cotangents), strict=True))

    for exponent in EXPONENTS:
        args = arguments(rng, exponent, length)
        outputs = jax.eval_shape(lambda args: run(**args), args)
        cotangents = jax.tree.map(
            lambda x: rng.standard_normal(x.shape).astype(np.float32), outputs
        )
        with jax.set_mesh(over(axes)):
            found = gradients(args, cotangents)
        expected = formulas.in_float64(formula, args, cotangents)[1]
        assert_close(found, {"A": expected["A"], "dt": expected["dt"]}, 1e-5)


def condition_of_A(args, cotangents, head):
    """Return how much the terms of a head's gradient of A cancel: sum of |terms| / |their sum|.

    The term of tokens s < t is dy_t x_s (C_t B_s) delta_s S exp(A S) with S = delta_s+1 + ... +
    delta_t.
    """
    float64 = {name: np.asarray(x, np.float64) for name, x in args.items()}
    group = head // 2
    delta = np.logaddexp(0, float64["dt"][..., head])
    total = np.cumsum(delta, axis=1)
    spans = np.tril(total[:, :, None] - total[:, None], -1)
    inputs = np.einsum("btp,bsp->bts", cotangents[:, :, head], float64["x"][:, :, head])
    states = np.einsum("btk,bsk->bts", float64["C"][:, :, group], float64["B"][:, :, group])
    terms = inputs * states * delta[:, None] * spans * np.exp(float64["A"][head] * spans)
    return np.abs(terms).sum() / np.abs(terms.sum())


@pytest.mark.parametrize("run", [ssd, run_ssd_pallas], ids=["default", "pallas_tpu"])
@pytest.mark.parametrize("share", [0.03, 0.3])
def test_ssd_with_small_steps_among_large_ones(rng, share, run):
    """Few pairs of tokens have weights that are not almost zero."""
    condition = np.inf
    while condition > 100:  # no order of summation is exact where the terms cancel
        args = ssd_arguments(rng, 1, 200)
        steps = np.where(rng.random(args["dt"].shape) < share, 5.0, -5.0).astype(np.float32)
        args |= {"dt": steps, "A": np.array([-16.0, -4.0, -1.0, -0.1], np.float32)}
        cotangents = rng.standard_normal(args["x"].shape).astype(np.float32)
        condition = max(condition_of_A(args, cotangents, head) for head in range(4))

    def y(**args):  # without the last state, which some return
        return jax.tree.leaves(run(**args))[0]

    def gradient(A, dt):
        return jax.vjp(lambda A, dt: y(**args | {"A": A, "dt": dt}), A, dt)[1](cotangents)

    found = dict(zip(("A", "dt"), jax.jit(gradient)(args["A"], args["dt"]), strict=True))
    expected = formulas.in_float64(lambda **args: formulas.ssd(**args)[0], args, cotangents)[1]
    for head in range(4):
        of_head = {name: x[..., head] for name, x in found.items()}
        assert_close(of_head, {name: expected[name][..., head] for name in found}, 1e-5)
