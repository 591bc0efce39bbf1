import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels.causal_conv import causal_conv
from tests.kernels.reference import assert_close, cotangents_like, with_gradients


def arguments(rng, batch, length, width, taps, dtype=np.float32, *, optional=True):
    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    args = {"x": normal(batch, length, width), "weight": normal(taps, width)}
    if optional:
        args |= {
            "bias": normal(width),
            "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1)),
            "initial_state": normal(batch, taps - 1, width),
        }
    return args


@jax.jit
def run(args):
    return causal_conv(**args, return_final_state=True)


run_with_gradients = jax.jit(with_gradients(run))


@pytest.mark.parametrize(
    ("length", "width", "taps", "optional", "dtype"),
    [
        (1, 3, 4, True, "float32"),
        (2, 3, 4, True, "float32"),
        (7, 5, 1, True, "float32"),
        (33, 5, 4, False, "float32"),
        (100, 3, 3, True, "float32"),
        (33, 5, 4, True, "bfloat16"),
    ],
)
def test_outputs_and_gradients(rng, length, width, taps, optional, dtype):
    args = arguments(rng, 2, length, width, taps, dtype, optional=optional)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    outputs, gradients = run_with_gradients(args, cotangents)
    assert all(x.dtype == dtype for x in jax.tree.leaves((outputs, gradients)))
    expected = formulas.in_float64(formulas.causal_conv, args, cotangents)
    assert_close(outputs, expected[0], 1e-5 if dtype == "float32" else 1e-2)
    assert_close(gradients, expected[1], 1e-4 if dtype == "float32" else 1e-2)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    st.sets(st.integers(1, 11), max_size=4), st.integers(0, 2**32), st.sampled_from([1, 2, 6, 11])
)
def test_two_calls_continue_one(starts, seed, cut):
    starts -= {cut}  # the state belongs to the document that continues
    args = arguments(np.random.default_rng(seed), 1, 12, 3, 4)
    args["segment_ids"] = jnp.asarray(np.isin(np.arange(12), sorted(starts)).cumsum())[None]
    first, rest = (
        {name: args[name][:, part] for name in ("x", "segment_ids")}
        for part in (slice(cut), slice(cut, None))
    )
    y_first, state = run(args | first)
    y_second, state = run(args | rest | {"initial_state": state})
    whole = jax.tree.map(np.asarray, run(args))
    assert_close((jnp.concatenate([y_first, y_second], 1), state), whole, 1e-6)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(1, 11), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(start, seed):
    rng = np.random.default_rng(seed)
    args, others = (arguments(rng, 1, 12, 3, 4) for _ in range(2))
    args["segment_ids"] = (jnp.arange(12) >= start).astype(int)[None]
    perturbed = args | {
        "initial_state": others["initial_state"],
        "x": args["x"].at[:, :start].set(others["x"][:, :start]),
    }

    def after_start(args):
        (y, state), gradients = run_with_gradients(
            args, (jnp.ones((1, 12, 3)), jnp.ones((1, 3, 3)))
        )
        return y[:, start:], state, gradients["x"][:, start:]

    for a, b in zip(after_start(args), after_start(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 2, 7, 5, 4)
    with pytest.raises(ValueError, match=r"initial_state must be \[B, W-1, E\] = \(2, 3, 5\)"):
        causal_conv(**args | {"initial_state": jnp.zeros((2, 4, 5))})
    with pytest.raises(ValueError, match=r"weight must be \[W, E\] = \(4, 5\); got .*\(4, 6\)"):
        causal_conv(**args | {"weight": jnp.zeros((4, 6))})
    with pytest.raises(ValueError, match=r"x must be \[B, L, E\]"):
        causal_conv(**args | {"x": jnp.zeros((7, 5))})
