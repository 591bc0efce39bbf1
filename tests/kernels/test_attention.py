from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.attention import attention
from tests.kernels import reference
from tests.kernels.reference import assert_close, cotangents_like


def arguments(rng, batch, length, heads, groups, size, dtype=np.float32, *, optional=True):
    def normal(heads):
        return jnp.asarray(rng.standard_normal((batch, length, heads, size)), dtype)

    args = {"q": normal(heads), "k": normal(groups), "v": normal(groups)}
    if optional:
        args["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1))
    return args


@jax.jit
def run_with_gradients(args, cotangent):
    floats = {name: args[name] for name in ("q", "k", "v")}
    output, vjp = jax.vjp(lambda floats: attention(**args | floats), floats)
    return output, vjp(cotangent)[0]


@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "optional", "dtype"),
    [
        (1, 2, 1, 3, True, "float32"),
        (7, 3, 3, 5, True, "float32"),
        (33, 6, 2, 7, False, "float32"),
        (100, 4, 2, 5, True, "float32"),
        (600, 2, 1, 4, True, "float32"),
        (100, 4, 2, 5, True, "bfloat16"),
    ],
)
def test_outputs_and_gradients(rng, length, heads, groups, size, optional, dtype):
    args = arguments(rng, 2, length, heads, groups, size, dtype, optional=optional)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent)
    assert all(x.dtype == dtype for x in jax.tree.leaves((output, gradients)))
    expected = reference.in_float64(reference.attention, args, cotangent)
    assert_close(output, expected[0], 1e-5 if dtype == "float32" else 1e-2)
    assert_close(gradients, expected[1], 1e-4 if dtype == "float32" else 1e-2)


def test_large_scores_neither_overflow_nor_mix(rng):
    """Scores far beyond exp's range: each token takes the value of its best key."""
    args = arguments(rng, 1, 90, 2, 1, 8, optional=False)
    args |= {"q": 1e5 * args["q"], "k": 1e5 * args["k"]}
    output, gradients = run_with_gradients(args, jnp.ones_like(args["q"]))
    scores = np.einsum("bthk,bsk->bhts", args["q"], args["k"][:, :, 0])
    best = np.where(np.tri(90), scores, -np.inf).argmax(-1)  # [B, H, T]
    expected = np.asarray(args["v"])[0, best[0].T, 0]
    np.testing.assert_allclose(output[0], expected, rtol=1e-6)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(1, 99), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(start, seed):
    rng = np.random.default_rng(seed)
    args, others = (arguments(rng, 1, 100, 4, 2, 8, optional=False) for _ in range(2))
    args["segment_ids"] = (jnp.arange(100) >= start).astype(int)[None]
    perturbed = args | {
        name: args[name].at[:, :start].set(10 * others[name][:, :start]) for name in others
    }
    results = [
        jax.tree.map(lambda x: x[:, start:], run_with_gradients(case, jnp.ones_like(args["q"])))
        for case in (args, perturbed)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)


def test_sharded_over_batch_and_query_heads(rng):
    """All query heads share one key-value head, whose gradient is the sum over the devices."""
    args = arguments(rng, 4, 33, 6, 1, 7)
    mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    specs = {name: P("data") for name in args} | {"q": P("data", None, "model")}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=specs["q"])
    def sharded(args):
        return attention(**args)

    floats = {name: args[name] for name in ("q", "k", "v")}
    gradients = jax.jit(jax.grad(lambda floats: sharded(args | floats).sum()))(floats)
    whole = run_with_gradients(args, jnp.ones_like(args["q"]))[1]
    assert_close(gradients, jax.tree.map(np.asarray, whole), 1e-5)


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 2, 7, 4, 2, 5)
    with pytest.raises(ValueError, match=r"v must be \[B, T, H_kv, K\] = \(2, 7, 2, 5\)"):
        attention(**args | {"v": args["q"]})
    with pytest.raises(ValueError, match="4 query heads must be a multiple of the 3 key-value"):
        attention(args["q"], args["q"][:, :, :3], args["q"][:, :, :3])
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, K\]"):
        attention(**args | {"q": args["q"][0]})
