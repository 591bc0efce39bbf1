from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.ssd import ssd, ssd_step
from tests.kernels import reference
from tests.kernels.reference import assert_close, cotangents_like

PER_TOKEN = ["x", "dt", "B", "C"]


def arguments(
    rng, batch, length, heads, groups, dtype=np.float32, *, size=3, states=4, optional=True
):
    def normal(*shape, dtype=np.float32):
        return rng.standard_normal(shape).astype(dtype)

    args = {
        "x": normal(batch, length, heads, size, dtype=dtype),
        "dt": normal(batch, length, heads, dtype=dtype) - 1,
        "A": -np.exp(normal(heads)),
        "B": normal(batch, length, groups, states, dtype=dtype),
        "C": normal(batch, length, groups, states, dtype=dtype),
        "D": normal(heads),
    }
    if optional:
        args |= {
            "dt_bias": normal(heads),
            "segment_ids": np.sort(rng.integers(0, 3, (batch, length)), axis=1),
            "initial_state": normal(batch, heads, size, states),
        }
    return args


@jax.jit
def run(args):
    return ssd(**args, return_final_state=True)


@jax.jit
def run_with_gradients(args, cotangents):
    floats = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    outputs, vjp = jax.vjp(lambda floats: run(args | floats), floats)
    return outputs, vjp(cotangents)[0]


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
    args = arguments(rng, 2, length, heads, groups, optional=optional)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    outputs, gradients = run_with_gradients(args, cotangents)
    expected = formulas.in_float64(formulas.ssd, args, cotangents)
    assert_close(outputs, expected[0], 1e-5)
    assert_close(gradients, expected[1], 1e-4)


def test_bfloat16(rng):
    args = arguments(rng, 2, 440, 4, 2, jnp.bfloat16, size=16, states=16)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    (y, state), gradients = run_with_gradients(args, cotangents)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(gradients[name].dtype == args[name].dtype for name in gradients)
    expected = formulas.in_float64(formulas.ssd, args, cotangents)
    assert_close((y, state), expected[0], 1e-2)
    assert_close(gradients, expected[1], 1e-2)


@pytest.mark.parametrize("share", [0.03, 0.3])
def test_small_time_steps_among_large_ones(rng, share):
    """Most decays are differences of far larger sums of exponents."""
    args = arguments(rng, 2, 200, 3, 1)
    args["dt"] = jnp.where(rng.random((2, 200, 3)) < share, 5.0, -5.0) + 0.1 * args["dt"]
    args["A"] = jnp.array([-16.0, -4.0, -1.0])
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    outputs, gradients = run_with_gradients(args, cotangents)
    expected = formulas.in_float64(formulas.ssd, args, cotangents)
    assert_close(outputs, expected[0], 1e-5)
    assert_close(gradients, expected[1], 1e-4)


def test_large_time_steps_forget_everything(rng):
    """exp(delta A) underflows to zero: the state is the last input's, and nothing is NaN."""
    args = arguments(rng, 2, 100, 4, 2, optional=False)
    args |= {"dt": args["dt"] + 1e6, "A": args["A"] - 1}
    cotangents = cotangents_like(rng, jax.eval_shape(run, args))
    (_, state), gradients = run_with_gradients(args, cotangents)
    last = jnp.einsum("bhp,bhs->bhps", args["x"][:, -1], jnp.repeat(args["B"][:, -1], 2, axis=1))
    np.testing.assert_allclose(state, args["dt"][:, -1, :, None, None] * last, rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in gradients.values())


def test_two_calls_continue_one(rng):
    args, cut = arguments(rng, 2, 200, 4, 2), 71
    args["segment_ids"][:, cut] = args["segment_ids"][:, cut - 1]
    names = [*PER_TOKEN, "segment_ids"]
    y_first, state = run(args | {name: args[name][:, :cut] for name in names})
    rest = {name: args[name][:, cut:] for name in names} | {"initial_state": state}
    y_second, state = run(args | rest)
    whole = jax.tree.map(np.asarray, run(args))
    assert_close((jnp.concatenate([y_first, y_second], 1), state), whole, 1e-5)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sets(st.integers(1, 149), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(starts, seed):
    rng = np.random.default_rng(seed)
    args, others = (arguments(rng, 1, 150, 2, 1) for _ in range(2))
    args["segment_ids"] = (np.isin(np.arange(150), sorted(starts)).cumsum() % 3)[None]
    start = sorted(starts)[len(starts) // 2]
    perturbed = args | {"initial_state": others["initial_state"]}
    for name in PER_TOKEN:
        perturbed[name] = np.concatenate([others[name][:, :start], args[name][:, start:]], axis=1)

    def after_start(args):
        ones = np.ones((1, 150, 2, 3), np.float32), np.ones((1, 2, 3, 4), np.float32)
        (y, state), gradients = jax.tree.map(np.asarray, run_with_gradients(args, ones))
        return [state, y[:, start:]] + [gradients[name][:, start:] for name in PER_TOKEN]

    for a, b in zip(after_start(args), after_start(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inside_scan_and_checkpoint(rng):
    """Layers as `jax.lax.scan` over checkpointed blocks have the gradients of a plain loop."""
    args = arguments(rng, 1, 70, 4, 2, optional=False)
    layers = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)

    def block(x, D):
        return jnp.tanh(ssd(**args | {"x": x, "D": D}))

    def by_scan(layers):
        step = jax.checkpoint(lambda x, D: (block(x, D), None))
        return jax.lax.scan(step, args["x"], layers)[0].sum()

    def by_loop(layers):
        x = args["x"]
        for D in layers:
            x = block(x, D)
        return x.sum()

    scanned, looped = (jax.jit(jax.grad(f))(layers) for f in (by_scan, by_loop))
    np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-5)


def test_no_array_holds_the_decays_of_all_chunks():
    batch, length, heads, size, states = 2, 2048, 4, 16, 16
    args = arguments(np.random.default_rng(0), batch, length, heads, 1, size=size, states=states)
    cotangents = jax.tree.map(jnp.ones_like, jax.eval_shape(run, args))
    jaxpr = jax.make_jaxpr(run_with_gradients)(args, cotangents)
    assert max(reference.array_sizes(jaxpr)) == batch * length * heads * size


@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_over_batch_and_heads(rng, groups):
    args = arguments(rng, 4, 100, 4, groups)
    ones = jnp.ones_like(args["x"]), jnp.ones_like(args["initial_state"])
    mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    specs = {name: P("data", None, "model") for name in ("x", "dt")}
    specs |= {name: P("model") for name in ("A", "D", "dt_bias")}
    specs |= {name: P("data", None, "model" if groups > 1 else None) for name in ("B", "C")}
    specs |= {"segment_ids": P("data"), "initial_state": P("data", "model")}
    outputs = specs["x"], specs["initial_state"]

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=outputs)
    def sharded(args):
        return run(args)

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    vjp = jax.vjp(lambda floats: sharded(args | floats), floats)[1]
    whole = jax.tree.map(np.asarray, run_with_gradients(args, ones)[1])
    assert_close(jax.jit(vjp)(ones)[0], whole, 1e-5)


def test_one_token_after_another_is_the_scan(rng):
    args = arguments(rng, 2, 9, 4, 2)
    del args["segment_ids"]
    expected = run(args)
    state, ys = args.pop("initial_state"), []
    for t in range(9):
        y, state = ssd_step(**args | {name: args[name][:, t] for name in PER_TOKEN}, state=state)
        ys.append(y)
    assert_close((jnp.stack(ys, 1), state), jax.tree.map(np.asarray, expected), 1e-5)
    token = {name: args[name][:, 0] for name in PER_TOKEN}
    ones = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="4 heads are not 3 equal groups"):
        ssd_step(**args | token | {"B": ones, "C": ones}, state=state)
    with pytest.raises(ValueError, match=r"ssd_step: x must be \[B, H, P\]"):
        ssd_step(**args, state=state)


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 2, 7, 6, 3)
    with pytest.raises(ValueError, match=r"'fast'; accepted: 'xla'"):
        ssd(**args, backend="fast")
    for name in args.keys() - {"x", "B"}:
        with pytest.raises(ValueError, match=rf"{name} must be \[.*\] = .*, found shape \(1,"):
            ssd(**args | {name: args[name][:1]})
    with pytest.raises(ValueError, match=r"B must be \[B, L, G, S\] = .*, found shape \(1,"):
        ssd(**args | {"B": args["B"][:1]})
    with pytest.raises(ValueError, match=r"x must be \[B, L, H, P\]"):
        ssd(**args | {"x": args["x"][0]})
    four = {name: jnp.zeros((2, 7, 4, 4)) for name in ("B", "C")}
    with pytest.raises(ValueError, match="6 heads do not divide into 4 groups"):
        ssd(**args | four)
