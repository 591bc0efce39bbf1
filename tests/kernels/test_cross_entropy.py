from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flowhn_jax.bench import formulas
from kernels.cross_entropy import cross_entropy
from tests.kernels import reference
from tests.kernels.reference import assert_close, cotangents_like, with_gradients

both_reductions = pytest.mark.parametrize("reduction", ["sum", "none"])


def arguments(rng, tokens, width, vocabulary, dtype=np.float32):
    """Return arguments with tokens of weight zero, some with targets outside the vocabulary."""
    targets = rng.integers(0, vocabulary, tokens)
    ignored, wrong = rng.random((2, tokens)) < 0.5
    ignored[0] = False
    targets = np.where(ignored & wrong, rng.choice([-1, vocabulary], tokens), targets)
    return {
        "hidden": jnp.asarray(rng.standard_normal((tokens, width)), dtype),
        "head": jnp.asarray(rng.standard_normal((width, vocabulary)), np.float32),
        "targets": jnp.asarray(targets),
        "weights": jnp.asarray(np.where(ignored, 0, rng.random(tokens) + 0.5), np.float32),
    }


@partial(jax.jit, static_argnames=("reduction", "chunk_size", "z_loss"))
def run(args, reduction, chunk_size=None, z_loss=0.0):
    return cross_entropy(**args, reduction=reduction, chunk_size=chunk_size, z_loss=z_loss)


@partial(jax.jit, static_argnames=("reduction", "chunk_size", "z_loss"))
def run_with_gradients(args, cotangent, reduction, chunk_size=None, z_loss=0.0):
    return with_gradients(lambda args: run(args, reduction, chunk_size, z_loss))(args, cotangent)


@both_reductions
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "chunk_size", "z_loss", "dtype"),
    [
        (1, 3, 5, None, 0.0, "float32"),
        (7, 3, 11, 3, 0.3, "float32"),
        (100, 5, 13, 16, 0.0, "float32"),
        (33, 5, 13, 8, 1e-4, "bfloat16"),
    ],
)
def test_outputs_and_gradients(
    rng, reduction, tokens, width, vocabulary, chunk_size, z_loss, dtype
):
    args = arguments(rng, tokens, width, vocabulary, dtype)
    cotangent = cotangents_like(rng, jax.eval_shape(partial(run, reduction=reduction), args))
    output, gradients = run_with_gradients(args, cotangent, reduction, chunk_size, z_loss)
    assert output.dtype == jnp.float32
    assert all(gradients[name].dtype == args[name].dtype for name in gradients)
    np.testing.assert_allclose(output, run(args, reduction, chunk_size, z_loss), rtol=1e-6)

    def losses(**args):
        weighted = formulas.cross_entropy(**args, z_loss=z_loss)
        return weighted.sum() if reduction == "sum" else weighted

    head = args["head"].astype(dtype)  # as the products see it
    expected = formulas.in_float64(losses, args | {"head": head}, cotangent)
    # The gradient of a weight whose target does not exist is left open.
    exists = (args["targets"] >= 0) & (args["targets"] < vocabulary)
    for each in (gradients, expected[1]):
        each["weights"] = np.where(exists, each["weights"], 0)
    # A token whose target is almost certain has a small loss, of logits that are not small.
    assert_close(output, expected[0], 1e-5 if dtype == "float32" else 1e-2, scale=1)
    assert_close(gradients, expected[1], 1e-4 if dtype == "float32" else 1e-2, scale=1)


# Rows of a head [3, 12] whose logits are far from their mean, for hidden states of ones.
FAR = {
    "one 200 above": lambda normal: np.where(np.arange(12) == 1, 200, 0),
    "one 200 above the others' noise": lambda normal: np.where(np.arange(12) == 1, 200, normal),
    "one -1e30": lambda normal: np.where(np.arange(12) == 1, -1e30, normal),
    "all but one -1e30": lambda normal: np.where(np.arange(12) == 1, 0, -1e30),
    "all equal": lambda normal: np.zeros(12),
    "all 64": lambda normal: np.full(12, 64),
    "of size 1e4": lambda normal: 1e4 * normal,
}


def far_logits(rng, kind, tokens=40):
    """Return arguments; hidden states of ones, or close to zero, whose logits are not far."""
    args = arguments(rng, tokens, 3, 12)
    near = rng.random((tokens, 1)) < 0.3
    hidden = np.where(near, 1e-2 * args["hidden"], 1 / 3)
    head = np.stack([FAR[kind](row) for row in np.asarray(args["head"])])
    return args | {"hidden": jnp.float32(hidden), "head": jnp.float32(head)}


@both_reductions
@pytest.mark.parametrize("kind", FAR)
def test_logits_far_from_their_mean(rng, reduction, kind):
    args = far_logits(rng, kind)
    cotangent = cotangents_like(rng, jax.eval_shape(partial(run, reduction=reduction), args))
    output, gradients = run_with_gradients(args, cotangent, reduction, 16)

    def losses(**args):
        weighted = formulas.cross_entropy(**args)
        return weighted.sum() if reduction == "sum" else weighted

    expected = formulas.in_float64(losses, args, cotangent)
    exists = (args["targets"] >= 0) & (args["targets"] < 12)
    for each in (gradients, expected[1]):
        each["weights"] = np.where(exists, each["weights"], 0)
    assert_close(output, expected[0], 1e-5, scale=1)
    assert_close(gradients, expected[1], 1e-4, scale=1)


def test_exponentials_outside_of_the_range_of_float16(rng):
    args = arguments(rng, 9, 3, 12, np.float16)
    args |= {"hidden": jnp.full((9, 3), 0.5, np.float16), "head": args["head"].at[:, 1].set(16)}
    output, gradients = run_with_gradients(args, jnp.float32(1), "sum")

    def loss(hidden, head):
        others = {name: args[name] for name in ("targets", "weights")}
        return formulas.cross_entropy(hidden, head, **others).sum()

    floats = {"hidden": args["hidden"], "head": args["head"].astype(np.float16)}
    expected = formulas.in_float64(loss, floats, jnp.float32(1))
    assert_close(output, expected[0], 1e-2)
    assert_close({name: gradients[name] for name in floats}, expected[1], 1e-2)


@both_reductions
def test_logits_of_minus_infinity_count_as_absent(rng, reduction):
    """Losses and the gradients of the other words' columns are those without the word."""
    args = far_logits(rng, "all equal")
    args["head"] = args["head"].at[:, 1].set(-jnp.inf)
    args["hidden"] = jnp.full_like(args["hidden"], 0.3)
    args["targets"] = jnp.where(args["targets"] == 1, 0, args["targets"])
    without = args | {
        "head": args["head"][:, jnp.arange(12) != 1],
        "targets": jnp.where(args["targets"] > 1, args["targets"] - 1, args["targets"]),
    }
    cotangent = jnp.ones(40 if reduction == "none" else ())
    with_word, without_it = (
        run_with_gradients(each, cotangent, reduction) for each in (args, without)
    )
    np.testing.assert_allclose(with_word[0], without_it[0], rtol=1e-6)
    columns = np.delete(with_word[1]["head"], 1, axis=1)
    np.testing.assert_allclose(columns, without_it[1]["head"], rtol=1e-5, atol=1e-6)


@both_reductions
@pytest.mark.parametrize("factor", [9, 1e4])
def test_tokens_of_weight_zero_contribute_nothing(rng, reduction, factor):
    args = arguments(rng, 20, 3, 7)
    args["weights"] = args["weights"].at[jnp.array([3, 11])].set(0)
    ignored = np.asarray(args["weights"] == 0)
    others = arguments(rng, 20, 3, 7)
    perturbed = args | {
        "hidden": jnp.where(ignored[:, None], factor * others["hidden"], args["hidden"]),
        "targets": jnp.where(ignored, rng.integers(-5, 15, 20), args["targets"]),
    }
    cotangent = jnp.ones_like(args["weights"] if reduction == "none" else 0.0)
    results = []
    for case in (args, perturbed):
        output, gradients = run_with_gradients(case, cotangent, reduction, 8)
        assert not gradients["hidden"][ignored].any()
        results.append([output, gradients["head"], gradients["hidden"]])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@both_reductions
@pytest.mark.parametrize("target", [-1, 7])
def test_a_weighted_target_out_of_range_is_nan(rng, reduction, target):
    args = arguments(rng, 9, 3, 7)
    args["targets"] = args["targets"].at[0].set(target)
    losses = np.atleast_1d(run(args, reduction))
    assert np.isnan(losses[0])
    assert np.isfinite(losses[1:]).all()


def test_weights_default_to_one(rng):
    args = arguments(rng, 9, 3, 7)
    args["targets"] = jnp.abs(args["targets"]) % 7
    del args["weights"]
    ones = args | {"weights": jnp.ones(9)}
    np.testing.assert_array_equal(run(args, "sum"), run(ones, "sum"))


@both_reductions
@pytest.mark.parametrize(("chunk_size", "largest"), [(300, 300 * 65536), (None, 2**27 // 4)])
def test_logits_never_exist_whole(reduction, chunk_size, largest):
    shapes = {
        "hidden": jax.ShapeDtypeStruct((2000, 16), jnp.bfloat16),
        "head": jax.ShapeDtypeStruct((16, 65536), jnp.float32),
        "targets": jax.ShapeDtypeStruct((2000,), jnp.int32),
        "weights": jax.ShapeDtypeStruct((2000,), jnp.float32),
    }
    cotangent = jax.eval_shape(partial(run, reduction=reduction), shapes)
    jaxpr = jax.make_jaxpr(run_with_gradients, static_argnums=(2, 3))(
        shapes, cotangent, reduction, chunk_size
    )
    assert largest // 2 < max(reference.array_sizes(jaxpr)) <= largest


@both_reductions
def test_sharded_over_tokens(rng, reduction):
    args = arguments(rng, 40, 3, 7)
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    specs = {name: P() if name == "head" else P("data") for name in args}

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=P("data"))
    def sharded(args):
        return jnp.atleast_1d(run(args, reduction, 4))

    floats = {name: x for name, x in args.items() if name != "targets"}
    gradients = jax.jit(jax.grad(lambda floats: sharded(args | floats).sum()))(floats)
    cotangent = jnp.ones(40) if reduction == "none" else jnp.float32(1)
    whole = run_with_gradients(args, cotangent, reduction)[1]
    assert_close(gradients, jax.tree.map(np.asarray, whole), 1e-5)


@both_reductions
def test_over_a_mesh_the_gradient_of_the_head_is_summed_once(rng, reduction):
    args = arguments(rng, 64, 3, 7)
    cotangent = jnp.ones(64) if reduction == "none" else jnp.float32(1)
    one_device = run_with_gradients(args, cotangent, reduction, 4)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        sharded = {
            name: jax.device_put(x, NamedSharding(mesh, P()) if name == "head" else rows)
            for name, x in args.items()
        }
        compiled = run_with_gradients.lower(sharded, cotangent, reduction, 4).compile()
        results = compiled(sharded, cotangent)
    assert_close(results, jax.tree.map(np.asarray, one_device), 1e-5)
    assert compiled.as_text().count("all-reduce(") <= 2  # the head's gradient, the sum
    assert "all-gather" not in compiled.as_text()


@both_reductions
def test_a_vocabulary_over_devices(rng, reduction):
    """Each device has only its part of the head and of its gradient."""
    args = arguments(rng, 40, 3, 12)
    cotangent = jnp.asarray(rng.standard_normal(40 if reduction == "none" else ()), jnp.float32)
    one_device = run_with_gradients(args, cotangent, reduction, 4)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        head = jax.device_put(args["head"], NamedSharding(mesh, P(None, "tensor")))
        compiled = run_with_gradients.lower(args | {"head": head}, cotangent, reduction, 4)
        compiled = compiled.compile()
        results = compiled(args | {"head": head}, cotangent)
    assert_close(results, jax.tree.map(np.asarray, one_device), 1e-5)
    assert results[1]["head"].sharding.spec == P(None, "tensor")


@both_reductions
def test_a_head_in_shards_over_sequences_and_positions(rng, reduction):
    """The head is gathered, and each device gets its part of the gradient."""
    args = arguments(rng, 48, 8, 12)
    by_sequence = {
        name: x if name == "head" else x.reshape(4, 12, *x.shape[1:]) for name, x in args.items()
    }
    shape = (4, 12) if reduction == "none" else ()
    cotangent = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    one_device = run_with_gradients(by_sequence, cotangent, reduction, 5)
    flat = cotangent.ravel() if reduction == "none" else cotangent
    of_flat = run_with_gradients(args, flat, reduction, 5)
    assert_close(jax.tree.map(jnp.ravel, one_device), jax.tree.map(np.ravel, of_flat), 1e-6)
    axes = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * 4)
    spec = P(("fsdp", "sequence"), "tensor")
    with jax.set_mesh(mesh):
        arrays = by_sequence | {"head": jax.device_put(args["head"], NamedSharding(mesh, spec))}
        compiled = run_with_gradients.lower(arrays, cotangent, reduction, 5).compile()
        results = compiled(arrays, cotangent)
    assert_close(results, jax.tree.map(np.asarray, one_device), 1e-5)
    assert results[1]["head"].sharding.spec == spec
    # 8 x 6 of float32, a device's part of the vocabulary, is never summed whole.
    assert "f32[8,6]{1,0} all-reduce" not in compiled.as_text()
    assert "reduce-scatter(" in compiled.as_text()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tokens(reduction):
    hidden, head, targets = jnp.ones((0, 4)), jnp.ones((4, 8)), jnp.zeros(0, jnp.int32)
    losses, vjp = jax.vjp(
        lambda h, w: cross_entropy(h, w, targets, reduction=reduction), hidden, head
    )
    assert losses.sum() == 0
    np.testing.assert_array_equal(vjp(losses)[1], jnp.zeros((4, 8)))


def test_wrong_arguments():
    args = arguments(np.random.default_rng(0), 9, 3, 7)
    with pytest.raises(ValueError, match=r"reduction must be 'sum' or 'none'; got 'mean'"):
        cross_entropy(**args, reduction="mean")
    with pytest.raises(ValueError, match=r"z_loss must be at least 0; got -1"):
        cross_entropy(**args, z_loss=-1)
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1; got 0"):
        cross_entropy(**args, chunk_size=0)
    with pytest.raises(ValueError, match=r"head must be \[D, V\] = \(3, 3\); got .*\(7, 3\)"):
        cross_entropy(**args | {"head": args["head"].T})
    with pytest.raises(ValueError, match=r"targets must be \[N\] = \(9,\); got .*\(8,\)"):
        cross_entropy(**args | {"targets": args["targets"][1:]})
    with pytest.raises(ValueError, match=r"hidden must be \[N, D\] or \[B, T, D\]"):
        cross_entropy(**args | {"hidden": args["hidden"][0]})
