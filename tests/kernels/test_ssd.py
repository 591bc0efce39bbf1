import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.scan_inputs import ScanInputs
from kernels.ssd import ssd, ssd_step
from tests.kernels import reference
from tests.kernels.scans import Scan, random_documents

PER_TOKEN = ["x", "dt", "B", "C"]
SCAN = Scan(lambda args: ssd(**args, return_final_state=True), formulas.ssd, PER_TOKEN)


def ssd_inputs(args):
    """Return the arguments as the operation's backends take them."""
    return ScanInputs(*map(args.get, ScanInputs._fields))


def ssd_specs(groups):
    """Return how arguments and results are cut over `data` and `model`."""
    specs = {name: P("data", None, "model") for name in ("x", "dt")}
    specs |= {name: P("model") for name in ("A", "D", "dt_bias")}
    specs |= {name: P("data", None, "model" if groups > 1 else None) for name in ("B", "C")}
    specs |= {"segment_ids": P("data"), "initial_state": P("data", "model")}
    return specs, (specs["x"], specs["initial_state"])


def arguments(
    rng, batch, length, heads, groups, dtype=np.float32, *, size=3, states=4, optional=True
):
    """Return random arguments, with documents of any lengths."""

    def normal(*shape, dtype=np.float32):
        return rng.standard_normal(shape).astype(dtype)

    args = {"x": normal(batch, length, heads, size, dtype=dtype)}
    args |= {name: normal(batch, length, groups, states, dtype=dtype) for name in ("B", "C")}
    args |= {"dt": normal(batch, length, heads, dtype=dtype) - 1, "D": normal(heads)}
    args |= {"A": -np.exp(normal(heads))}
    if optional:
        args |= {"dt_bias": normal(heads), "initial_state": normal(batch, heads, size, states)}
        args |= {"segment_ids": random_documents(rng, batch, length)}
    return args


@pytest.mark.parametrize(
    ("length", "heads", "groups", "optional"),
    [
        (1, 2, 1, True),
        (7, 4, 2, True),
        (7, 4, 2, False),
        (440, 4, 1, True),
        (584, 6, 2, False),
        (584, 4, 4, True),
        (1025, 2, 1, True),
    ],
)
def test_outputs_and_gradients(rng, length, heads, groups, optional):
    SCAN.check_against_float64(rng, arguments(rng, 2, length, heads, groups, optional=optional))


def test_bfloat16(rng):
    args = arguments(rng, 2, 440, 4, 2, jnp.bfloat16, size=16, states=16)
    SCAN.check_against_float64(rng, args, 1e-2, 1e-2)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_small_time_steps_among_large_ones(rng, share):
    """Most decays are differences of far larger sums of exponents."""
    args = arguments(rng, 2, 200, 3, 1)
    args["dt"] = jnp.where(rng.random((2, 200, 3)) < share, 5.0, -5.0) + 0.1 * args["dt"]
    args["A"] = jnp.array([-16.0, -4.0, -1.0])
    SCAN.check_against_float64(rng, args)


def last_input(args):
    """Return what the last token adds to the state, with two heads in each group."""
    B = jnp.repeat(args["B"][:, -1], 2, axis=1)
    return args["dt"][:, -1, :, None, None] * jnp.einsum("bhp,bhs->bhps", args["x"][:, -1], B)


def test_large_time_steps_forget_everything(rng):
    args = arguments(rng, 2, 100, 4, 2, optional=False)
    SCAN.check_large_time_steps_forget(rng, args, last_input)


def test_two_calls_continue_one(rng):
    SCAN.check_two_calls_continue_one(arguments(rng, 2, 200, 4, 2), 71, 1e-5)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sets(st.integers(1, 149), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(starts, seed):
    SCAN.check_any_document_is_bitwise_alone(
        lambda rng: arguments(rng, 1, 150, 2, 1), 150, starts, seed
    )


def test_inside_scan_and_checkpoint(rng):
    SCAN.check_inside_scan_and_checkpoint(rng, arguments(rng, 1, 70, 4, 2, optional=False))


def test_no_array_holds_the_decays_of_all_chunks():
    batch, length, heads, size, states = 2, 2048, 4, 16, 16
    args = arguments(np.random.default_rng(0), batch, length, heads, 1, size=size, states=states)
    cotangents = jax.tree.map(jnp.ones_like, jax.eval_shape(SCAN.run, args))
    jaxpr = jax.make_jaxpr(SCAN.run_with_gradients)(args, cotangents)
    assert max(reference.array_sizes(jaxpr)) == batch * length * heads * size


@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_over_batch_and_heads(rng, groups):
    args = arguments(rng, 4, 100, 4, groups)
    ones = jnp.ones_like(args["x"]), jnp.ones_like(args["initial_state"])
    whole = SCAN.run_with_gradients(args, ones)[1]
    SCAN.check_sharded(args, ones, ssd_specs(groups), whole, 1e-5)


def test_one_token_after_another_is_the_scan(rng):
    SCAN.check_one_token_after_another(ssd_step, arguments(rng, 2, 9, 4, 2), 1e-5)


def test_wrong_arguments_of_a_step(rng):
    args = arguments(rng, 2, 9, 4, 2)
    del args["segment_ids"]
    state = args.pop("initial_state")
    token = {name: args[name][:, 0] for name in SCAN.per_token}
    ones = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"ssd_step: .* multiple of the 3 groups; got 4 heads"):
        ssd_step(**args | token | {"B": ones, "C": ones}, state=state)
    with pytest.raises(ValueError, match=r"ssd_step: x must be \[B, H, P\]"):
        ssd_step(**args, state=state)


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 2, 7, 6, 3)
    with pytest.raises(
        ValueError, match=r"must be one of 'pallas_tpu', 'triton', 'xla'; got 'fast'"
    ):
        ssd(**args, backend="fast")
    with pytest.raises(ValueError, match=r"B must be \[B, L, G, S\] = .*; got shape \(1,"):
        ssd(**args | {"B": args["B"][:1]})
    with pytest.raises(ValueError, match=r"x must be \[B, L, H, P\]"):
        ssd(**args | {"x": args["x"][0]})
    four = {name: jnp.zeros((2, 7, 4, 4)) for name in ("B", "C")}
    with pytest.raises(ValueError, match=r"ssd: .* multiple of the 4 groups; got 6 heads"):
        ssd(**args | four)
