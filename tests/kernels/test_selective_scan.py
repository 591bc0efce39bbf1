import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels.selective_scan import selective_scan, selective_scan_step
from tests.kernels import reference
from tests.kernels.scans import Scan, scan_arguments, scan_specs

PER_TOKEN = ["u", "dt", "B", "C", "z"]


def selective_scan_of(backend):
    def run(args):
        return selective_scan(**args, return_final_state=True, backend=backend)

    return Scan(run, formulas.selective_scan, PER_TOKEN)


both_backends = pytest.mark.parametrize(
    "scan",
    [
        pytest.param(selective_scan_of(name), id=name)
        for name in ("xla_associative", "xla_sequential")
    ],
)


def last_input(args):
    return (args["dt"] * args["u"])[:, -1, :, None] * args["B"][:, -1, None, :]


@both_backends
@pytest.mark.parametrize(
    ("length", "width", "states", "optional"),
    [(1, 5, 3, True), (7, 1, 4, True), (33, 6, 1, True), (33, 6, 1, False), (100, 5, 3, True)],
)
def test_outputs_and_gradients(rng, scan, length, width, states, optional):
    args = scan_arguments(rng, 2, length, width, states, optional=optional)
    scan.check_against_float64(rng, args)


@both_backends
def test_bfloat16(rng, scan):
    args = scan_arguments(rng, 2, 33, 5, 3, jnp.bfloat16)
    scan.check_against_float64(rng, args, 1e-2, 1e-2)


@both_backends
def test_large_time_steps_forget_everything(rng, scan):
    args = scan_arguments(rng, 2, 33, 5, 3, optional=False)
    scan.check_large_time_steps_forget(rng, args, last_input)


@both_backends
def test_two_calls_continue_one(rng, scan):
    scan.check_two_calls_continue_one(scan_arguments(rng, 2, 40, 5, 3), 21, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_token_after_another_is_the_scan(rng, dtype):
    args = scan_arguments(rng, 2, 9, 5, 3, dtype)
    selective_scan_of(None).check_one_token_after_another(selective_scan_step, args, 1e-6)


@both_backends
@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sets(st.integers(1, 69), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(scan, starts, seed):
    def make_arguments(rng):
        return scan_arguments(rng, 1, 70, 3, 4)

    scan.check_any_document_is_bitwise_alone(make_arguments, 70, starts, seed)


def test_inside_scan_and_checkpoint(rng):
    args = scan_arguments(rng, 1, 20, 4, 4, optional=False)
    selective_scan_of(None).check_inside_scan_and_checkpoint(rng, args)


@both_backends
def test_no_array_holds_the_states_of_all_tokens(scan):
    batch, length, width, states = 2, 512, 32, 16
    args = scan_arguments(np.random.default_rng(0), batch, length, width, states)
    cotangents = jax.tree.map(jnp.ones_like, jax.eval_shape(scan.run, args))
    jaxpr = jax.make_jaxpr(scan.run_with_gradients)(args, cotangents)
    largest = max(reference.array_sizes(jaxpr))
    assert batch * length * width <= largest <= batch * length * width * states // 8


def test_sharded_over_batch_and_width(rng):
    scan = selective_scan_of("xla_sequential")
    args = scan_arguments(rng, 4, 20, 6, 3)
    ones = jnp.ones_like(args["u"]), jnp.ones_like(args["initial_state"])
    whole = scan.run_with_gradients(args, ones)[1]
    scan.check_sharded(args, ones, scan_specs(args), whole, 1e-5)


def test_wrong_arguments():
    args = scan_arguments(np.random.default_rng(0), 2, 7, 5, 3)
    with pytest.raises(ValueError, match=r"must be one of 'pallas_tpu', 'triton', 'xla_.*'fast'"):
        selective_scan(**args, backend="fast")
    with pytest.raises(ValueError, match=r"selective_scan_step: u must be \[B, E\]"):
        selective_scan_step(*(args[name] for name in ("u", "dt", "A", "B", "C", "D")), state=0)
    with pytest.raises(ValueError, match=r"u must be \[B, L, E\]"):
        selective_scan(**args | {"u": args["u"][0]})
