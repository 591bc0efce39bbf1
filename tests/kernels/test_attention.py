from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.attention import attention, attention_step, splash
from kernels.attention.inputs import AttentionInputs, Visibility
from kernels.partition import over_mesh
from tests.kernels.reference import assert_close, cotangents_like


def interpreted_splash(q, k, v, segment_ids, window=None, scale=None):
    inputs = AttentionInputs(q, k, v, segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return splash.attention(inputs, Visibility(window), scale, interpret=True)


def arguments(rng, batch, length, heads, groups, size, dtype=np.float32, *, optional=True):
    def normal(heads):
        return jnp.asarray(rng.standard_normal((batch, length, heads, size)), dtype)

    args = {"q": normal(heads), "k": normal(groups), "v": normal(groups)}
    if optional:
        args["segment_ids"] = jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1))
    return args


@partial(jax.jit, static_argnames=("window", "run", "prefix"))
def run_with_gradients(args, cotangent, window=None, run=attention, prefix=None):
    floats = {name: args[name] for name in ("q", "k", "v")}
    sight = {"window": window} | ({} if prefix is None else {"prefix": prefix})
    output, vjp = jax.vjp(lambda floats: run(**args | floats, **sight), floats)
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
    expected = formulas.in_float64(formulas.attention, args, cotangent)
    assert_close(output, expected[0], 1e-5 if dtype == "float32" else 1e-2)
    assert_close(gradients, expected[1], 1e-4 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("window", [None, 30])
def test_queries_at_some_positions(rng, window):
    """Outputs and gradients are those of all queries with the other ones left out."""
    args = arguments(rng, 2, 200, 4, 2, 5)
    queries = np.sort(rng.choice(200, 90, replace=False))
    cotangent = cotangents_like(rng, args["q"]).at[:, np.setdiff1d(range(200), queries)].set(0)
    expected = formulas.in_float64(partial(formulas.attention, window=window), args, cotangent)
    run = partial(attention, queries=tuple(queries.tolist()))
    some = args | {"q": args["q"][:, queries]}
    output, gradients = run_with_gradients(some, cotangent[:, queries], window, run)
    assert_close(output, expected[0][:, queries], 1e-5)
    expected[1]["q"] = expected[1]["q"][:, queries]
    assert_close(gradients, expected[1], 1e-4)


def test_queries_must_be_positions():
    x = jnp.zeros((1, 3, 1, 2))
    for queries in ((0, 1), (0, 2, 1), (0, 1, 3), (-1, 0, 1)):
        with pytest.raises(ValueError, match="queries must be 3 ascending positions below 3; got"):
            attention(x, x, x, queries=queries)


@pytest.mark.parametrize("window", [1, 5, 70, 500])
def test_window(rng, window):
    args = arguments(rng, 2, 300, 4, 2, 5)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent, window)
    expected = formulas.in_float64(partial(formulas.attention, window=window), args, cotangent)
    assert_close(output, expected[0], 1e-5)
    # With one visible key the gradients of q and k are zero but for rounding.
    assert_close(gradients, expected[1], 1e-4, scale=0.1)


@pytest.mark.parametrize(
    ("prefix", "window", "optional"),
    [(1, 5, True), (9, 70, True), (70, 3, False), (40, None, True), (300, 2, True)],
)
def test_prefix(rng, prefix, window, optional):
    """All later tokens see the prefix, regardless of window and document."""
    args = arguments(rng, 2, 300, 4, 2, 5, optional=optional)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent, window, prefix=prefix)
    formula = partial(formulas.attention, window=window, prefix=prefix)
    expected = formulas.in_float64(formula, args, cotangent)
    assert_close(output, expected[0], 1e-5)
    assert_close(gradients, expected[1], 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(rng, dtype):
    """One query per sequence against the slots that it sees; the others hold arbitrary values."""
    args = arguments(rng, 3, 20, 6, 2, 8, dtype, optional=False)
    lengths = jnp.asarray([20, 1, 7])
    visible = jnp.arange(20) < lengths[:, None]
    rows = jnp.arange(3), lengths - 1
    kept = {
        name: jnp.where(visible[..., None, None], args[name], 1e3).swapaxes(1, 2)
        for name in ("k", "v")
    }
    found = attention_step(args["q"][rows], **kept, visible=visible)
    assert found.dtype == dtype
    expected = formulas.in_float64(formulas.attention, args, cotangents_like(rng, args["q"]))[0]
    assert_close(found, expected[rows], 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "optional", "window"),
    [(7, 2, 1, 24, True, None), (300, 4, 2, 24, True, None), (700, 2, 2, 32, False, 130)],
)
def test_splash(rng, length, heads, groups, size, optional, window):
    """The TPU kernel, interpreted."""
    args = arguments(rng, 2, length, heads, groups, size, jnp.bfloat16, optional=optional)
    args.setdefault("segment_ids", None)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent, window, interpreted_splash)
    present = {name: x for name, x in args.items() if x is not None}
    formula = partial(formulas.attention, window=window)
    expected = formulas.in_float64(formula, present, cotangent)
    assert_close(output, expected[0], 1e-2)
    assert_close(gradients, expected[1], 1e-2)


@pytest.mark.parametrize("max_fused_blocks", [4, 2])
def test_splash_with_three_blocks(rng, monkeypatch, max_fused_blocks):
    """Both backward passes: one kernel, or one for the queries and one for keys and values."""
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)
    monkeypatch.setattr(splash, "_MAX_FUSED_BLOCKS", max_fused_blocks)
    args = arguments(rng, 1, 300, 4, 2, 24, jnp.bfloat16)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent, None, partial(interpreted_splash))
    expected = formulas.in_float64(formulas.attention, args, cotangent)
    assert_close(output, expected[0], 1e-2)
    assert_close(gradients, expected[1], 1e-2)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [(attention, "float32"), (attention, "bfloat16"), (interpreted_splash, "bfloat16")],
)
def test_scale(rng, run, dtype):
    args = arguments(rng, 2, 90, 4, 2, 16, dtype)
    cotangent = cotangents_like(rng, args["q"])
    output, gradients = run_with_gradients(args, cotangent, None, partial(run, scale=0.3))

    def formula(q, **others):
        return formulas.attention(q * 0.3 * 16**0.5, **others)

    expected = formulas.in_float64(formula, args, cotangent)
    assert_close(output, expected[0], 1e-5 if dtype == "float32" else 1e-2)
    assert_close(gradients, expected[1], 1e-4 if dtype == "float32" else 1e-2)


def test_splash_over_a_mesh(rng):
    args = arguments(rng, 4, 130, 2, 1, 24, jnp.bfloat16)
    cotangent = cotangents_like(rng, args["q"])
    one_device = run_with_gradients(args, cotangent, None, interpreted_splash)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))

    def over_devices(q, k, v, segment_ids, window):
        run = partial(interpreted_splash, window=window)
        layouts = "B T heads K", "B T kv_heads K", "B T kv_heads K", "B T"
        return over_mesh(run, layouts, layouts[0])(q, k, v, segment_ids)

    with jax.set_mesh(mesh):
        sharded = run_with_gradients(args, cotangent, None, over_devices)
    for a, b in zip(*map(jax.tree.leaves, (one_device, sharded)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [1, 127, 576, 584, 1024, 1025, 2048, 5000, 32768])
def test_splash_blocks(length):
    block = splash.block_size(length)
    padded = length + -length % block
    assert block % 128 == 0
    assert block <= 640
    assert padded - length < max(128, 0.2 * length)


def test_large_scores_neither_overflow_nor_mix(rng):
    """With scores far out of exp's range each token gets the value of its best key."""
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
    with pytest.raises(
        ValueError, match="heads must be a multiple of the 3 key-value heads; got 4 heads"
    ):
        attention(args["q"], args["q"][:, :, :3], args["q"][:, :, :3])
    with pytest.raises(ValueError, match="window must be at least 1; got 0"):
        attention(**args, window=0)
    with pytest.raises(ValueError, match="prefix must be 0 to T = 7; got 8"):
        attention(**args, prefix=8)
    q, k = args["q"][:, 0], args["k"].swapaxes(1, 2)
    with pytest.raises(ValueError, match=r"visible must be \[B, C\] = \(2, 7\)"):
        attention_step(q, k, k, jnp.ones((2, 6), bool))
    with pytest.raises(ValueError, match="must be one of 'cudnn', 'splash', 'xla'; got 'flash'"):
        attention(**args, backend="flash")
    with pytest.raises(ValueError, match="'splash': it needs platform tpu, this is cpu"):
        attention(**args, backend="splash")
    with pytest.raises(ValueError, match=r"q must be \[B, T, H, K\]"):
        attention(**args | {"q": args["q"][0]})
