from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.selective_scan import selective_scan, selective_scan_step
from tests.kernels import reference
from tests.kernels.reference import assert_close, cotangents_like

PER_TOKEN = ["u", "dt", "B", "C", "z"]

both_backends = pytest.mark.parametrize("backend", ["xla_associative", "xla_sequential"])


def arguments(rng, batch, length, width, states, dtype=np.float32, *, optional=True):
    def normal(*shape, dtype=np.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    args = {
        "u": normal(batch, length, width, dtype=dtype),
        "dt": normal(batch, length, width, dtype=dtype) - 1,
        "A": -jnp.exp(normal(width, states)),
        "B": normal(batch, length, states, dtype=dtype),
        "C": normal(batch, length, states, dtype=dtype),
        "D": normal(width),
    }
    if optional:
        args |= {
            "z": normal(batch, length, width, dtype=dtype),
            "dt_bias": normal(width),
            "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (batch, length)), axis=1)),
            "initial_state": normal(batch, width, states),
        }
    return args


@partial(jax.jit, static_argnames="backend")
def run(args, backend):
    return selective_scan(**args, return_final_state=True, backend=backend)


@partial(jax.jit, static_argnames="backend")
def run_with_gradients(args, cotangents, backend):
    floats = {name: x for name, x in args.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    outputs, vjp = jax.vjp(lambda floats: run(args | floats, backend), floats)
    return outputs, vjp(cotangents)[0]


@both_backends
@pytest.mark.parametrize(
    ("length", "width", "states", "optional"),
    [(1, 5, 3, True), (7, 1, 4, True), (33, 6, 1, True), (33, 6, 1, False), (100, 5, 3, True)],
)
def test_outputs_and_gradients(rng, backend, length, width, states, optional):
    args = arguments(rng, 2, length, width, states, optional=optional)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, backend=backend))
    outputs, gradients = run_with_gradients(args, cotangents, backend)
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close(outputs, expected[0], 1e-5)
    assert_close(gradients, expected[1], 1e-4)


@both_backends
def test_bfloat16(rng, backend):
    args = arguments(rng, 2, 33, 5, 3, jnp.bfloat16)
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, backend=backend))
    (y, state), gradients = run_with_gradients(args, cotangents, backend)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(gradients[name].dtype == args[name].dtype for name in gradients)
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)
    assert_close((y, state), expected[0], 1e-2)
    assert_close(gradients, expected[1], 1e-2)


@both_backends
def test_large_time_steps_forget_everything(rng, backend):
    """exp(delta A) underflows to zero: the state is the last input's, and nothing is NaN."""
    args = arguments(rng, 2, 33, 6, 1, optional=False)
    args |= {"dt": args["dt"] + 1e6, "A": args["A"] - 1}
    cotangents = cotangents_like(rng, jax.eval_shape(run, args, backend=backend))
    (_, state), gradients = run_with_gradients(args, cotangents, backend)
    last = (args["dt"] * args["u"])[:, -1, :, None] * args["B"][:, -1, None, :]
    np.testing.assert_allclose(state, last, rtol=1e-5)
    assert all(jnp.isfinite(x).all() for x in gradients.values())


@both_backends
def test_two_calls_continue_one(rng, backend):
    args, cut = arguments(rng, 2, 40, 5, 3), 21
    args["segment_ids"] = args["segment_ids"].at[:, cut].set(args["segment_ids"][:, cut - 1])
    names = [*PER_TOKEN, "segment_ids"]
    y_first, state = run(args | {name: args[name][:, :cut] for name in names}, backend)
    rest = {name: args[name][:, cut:] for name in names} | {"initial_state": state}
    y_second, state = run(args | rest, backend)
    whole = jax.tree.map(np.asarray, run(args, backend))
    assert_close((jnp.concatenate([y_first, y_second], 1), state), whole, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_token_after_another_is_the_scan(rng, dtype):
    args = arguments(rng, 2, 9, 5, 3, dtype)
    del args["segment_ids"]
    expected = run(args, None)
    state, ys = args.pop("initial_state"), []
    for t in range(9):
        token = args | {name: args[name][:, t] for name in PER_TOKEN}
        y, state = selective_scan_step(**token, state=state)
        ys.append(y)
    assert ys[0].dtype == dtype
    assert_close((jnp.stack(ys, 1), state), jax.tree.map(np.asarray, expected), 1e-6)


@both_backends
@hypothesis.settings(max_examples=10)
@hypothesis.given(st.sets(st.integers(1, 69), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_document_is_bitwise_alone(backend, starts, seed):
    rng = np.random.default_rng(seed)
    args, others = (arguments(rng, 1, 70, 3, 4) for _ in range(2))
    args["segment_ids"] = jnp.asarray(np.isin(np.arange(70), sorted(starts)).cumsum() % 3)[None]
    start = sorted(starts)[len(starts) // 2]
    perturbed = args | {"initial_state": others["initial_state"]}
    for name in PER_TOKEN:
        perturbed[name] = args[name].at[:, :start].set(others[name][:, :start])

    def after_start(args):
        ones = jnp.ones((1, 70, 3)), jnp.ones((1, 3, 4))
        (y, state), gradients = run_with_gradients(args, ones, backend)
        return [state, y[:, start:]] + [gradients[name][:, start:] for name in PER_TOKEN]

    for a, b in zip(after_start(args), after_start(perturbed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inside_scan_and_checkpoint(rng):
    """Layers as `jax.lax.scan` over checkpointed blocks have the gradients of a plain loop."""
    args = arguments(rng, 1, 20, 4, 4, optional=False)
    layers = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)

    def block(u, D):
        return jnp.tanh(selective_scan(**args | {"u": u, "D": D}))

    def by_scan(layers):
        step = jax.checkpoint(lambda u, D: (block(u, D), None))
        return jax.lax.scan(step, args["u"], layers)[0].sum()

    def by_loop(layers):
        u = args["u"]
        for D in layers:
            u = block(u, D)
        return u.sum()

    scanned, looped = (jax.jit(jax.grad(f))(layers) for f in (by_scan, by_loop))
    np.testing.assert_allclose(scanned, looped, rtol=1e-4, atol=1e-5)


@both_backends
def test_no_array_holds_the_states_of_all_tokens(backend):
    batch, length, width, states = 2, 512, 32, 16
    args = arguments(np.random.default_rng(0), batch, length, width, states)
    cotangents = jax.tree.map(jnp.ones_like, jax.eval_shape(run, args, backend=backend))
    jaxpr = jax.make_jaxpr(run_with_gradients, static_argnums=2)(args, cotangents, backend)
    largest = max(reference.array_sizes(jaxpr))
    assert batch * length * width <= largest <= batch * length * width * states // 8


def test_sharded_over_batch_and_width(rng):
    backend = "xla_sequential"
    args = arguments(rng, 4, 20, 6, 3)
    ones = jnp.ones_like(args["u"]), jnp.ones_like(args["initial_state"])
    mesh = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    specs = {name: P("data", None, "model") for name in ("u", "dt", "z")}
    specs |= {name: P("model") for name in ("A", "D", "dt_bias")}
    specs |= {name: P("data") for name in ("B", "C", "segment_ids")}
    specs |= {"initial_state": P("data", "model")}
    outputs = specs["u"], specs["initial_state"]

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=outputs)
    def sharded(args):
        return run(args, backend)

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    vjp = jax.vjp(lambda floats: sharded(args | floats), floats)[1]
    whole = jax.tree.map(np.asarray, run_with_gradients(args, ones, backend)[1])
    assert_close(jax.jit(vjp)(ones)[0], whole, 1e-5)


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 2, 7, 5, 3)
    with pytest.raises(ValueError, match=r"'fast'; accepted: 'pallas_tpu', 'triton', 'xla_a"):
        selective_scan(**args, backend="fast")
    for name in args.keys() - {"u", "A"}:
        with pytest.raises(ValueError, match=rf"{name} must be \[.*\] = .*, found shape \(1,"):
            selective_scan(**args | {name: args[name][:1]})
    with pytest.raises(ValueError, match=r"selective_scan_step: u must be \[B, E\]"):
        selective_scan_step(*(args[name] for name in ("u", "dt", "A", "B", "C", "D")), state=0)
    with pytest.raises(ValueError, match=r"u must be \[B, L, E\]"):
        selective_scan(**args | {"u": args["u"][0]})
