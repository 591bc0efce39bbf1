import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels.partition import constrain, num_parts, over_mesh


def over_last(x, scale, shift):
    """Return [B] and [B, T] from [B, T], [T] and [B] or None."""
    y = jnp.tanh(x * scale) + (0 if shift is None else shift[:, None])
    return y.sum(1), y


@pytest.mark.parametrize("batch", [8, 3])  # 4 devices do not divide 3: each computes all
@pytest.mark.parametrize("shifted", [True, False])
def test_outputs_and_gradients(rng, batch, shifted):
    x, scale, shift = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((batch, 5), 5, batch)
    )
    seen = []

    def loss(arrays, mapped):
        def function(x, scale, shift):
            seen.append(x.shape[0])
            return over_last(x, scale, shift)

        if mapped:
            function = over_mesh(function, ("B T", "T", "B"), ("B", "B T"))
        total, y = function(arrays["x"], arrays["scale"], arrays.get("shift"))
        return (total**2).sum() + (y**3).sum()

    arrays = {"x": x, "scale": scale} | ({"shift": shift} if shifted else {})
    plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, False)
    mesh = jax.make_mesh((4, 2), ("data", "other"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        mapped = jax.jit(jax.value_and_grad(loss), static_argnums=1)(arrays, True)
    assert seen == [batch, batch // 4 if batch == 8 else batch]
    for a, b in zip(*map(jax.tree.leaves, (plain, mapped)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_mesh_the_function_is_unchanged():
    assert over_mesh(over_last, ("B T", "T", "B"), ("B", "B T")) is over_last
    with jax.set_mesh(jax.make_mesh((1,), ("data",), (AxisType.Auto,))):
        assert over_mesh(over_last, ("B T", "T", "B"), ("B", "B T")) is over_last


def test_query_heads_stay_with_their_key_value_heads():
    shapes = []

    def attend(q, k):
        shapes.append((q.shape, k.shape))
        return q

    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        for groups in (4, 2):  # two key-value heads do not divide over four devices
            mapped = over_mesh(attend, ("B heads", "B kv_heads"), "B heads")
            jax.jit(mapped)(jnp.ones((6, 8)), jnp.ones((6, groups)))
    assert shapes == [((3, 2), (3, 1)), ((3, 8), (3, 2))]


def test_sums_over_a_letter_that_is_cut():
    def total(x, axes):
        return jax.lax.psum(x.sum(1), axes)

    x = jnp.arange(24.0).reshape(2, 12)
    for sizes in ((2, 4), (1, 1)):
        with jax.set_mesh(jax.make_mesh(sizes, ("fsdp", "tensor"), (AxisType.Auto,) * 2)):
            mapped = over_mesh(total, ("B V",), "B", axes_of=("V",))
            np.testing.assert_array_equal(jax.jit(mapped)(x), x.sum(1))


def test_constrain():
    x = jnp.ones((8, 3, 6))
    assert constrain(x, "B T D") is x
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        cut = jax.jit(lambda x: constrain(x, "B T E"))(x)
        uneven = jax.jit(lambda x: constrain(x, "T E B"))(x)
    assert cut.sharding.shard_shape(x.shape) == (2, 3, 3)
    assert uneven.sharding.shard_shape(x.shape) == (8, 3, 3)  # 6 divides by data alone


def test_a_shard_that_cannot_be_cut_does_not_keep_tokens_whole():
    """Two devices of fsdp do not divide 5, but they divide the tokens."""
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        cut = jax.jit(lambda x: constrain(x, "B shard"))(jnp.ones((8, 5)))
    assert cut.sharding.shard_shape(cut.shape) == (2, 5)


def test_num_parts():
    assert num_parts("B") == 1
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert [num_parts(letter) for letter in ("B", "heads", "L")] == [2, 4, 1]
