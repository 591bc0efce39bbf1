"""Sums over a mesh axis of which each device gets its part."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import reduce_scatter as module


def sums(function, x, axes, axis):
    """Return the parts of all devices, each of which has its own x, [devices, ...]."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (jax.sharding.AxisType.Auto,) * 2)
    spec = P(tuple(axes))

    @partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def run(x):
        return function(x[0], axis)[None]

    return np.asarray(jax.jit(run)(x), np.float64), jax.jit(run).lower(x).compile().as_text()


@pytest.mark.parametrize(
    ("axes", "axis", "rows"),
    [
        ({"data": 1, "fsdp": 8}, "fsdp", 2),
        ({"data": 1, "fsdp": 8}, "fsdp", 3),
        ({"data": 1, "fsdp": 8}, "fsdp", 1),
        ({"data": 2, "fsdp": 4}, "fsdp", 3),
        ({"data": 2, "fsdp": 4}, "data", 5),
    ],
)
def test_a_ring_sums_each_devices_part(rng, axes, axis, rows):
    devices = axes[axis]
    x = rng.standard_normal((8, devices * rows, 5)).astype(np.float32)
    found, text = sums(module.ring_reduce_scatter, jnp.asarray(x), axes, axis)
    along = list(axes).index(axis)
    total = x.astype(np.float64).reshape(*axes.values(), devices, rows, 5).sum(along)
    # The part's index is the device's along the axis.
    expected = total.reshape(8 // devices, devices, rows, 5)
    expected = expected if along == 1 else expected.swapaxes(0, 1)
    np.testing.assert_allclose(found.reshape(-1, rows, 5), expected.reshape(-1, rows, 5), atol=1e-5)
    assert "all-reduce" not in text


@pytest.mark.parametrize(
    ("platform", "most", "permutes"), [("tpu", 8, True), ("tpu", 7, False), ("gpu", 8, False)]
)
def test_a_ring_where_xla_would_sum_the_whole(rng, monkeypatch, platform, most, permutes):
    monkeypatch.setattr(module, "target_platform", lambda: platform)
    monkeypatch.setattr(module, "_MAX_RING", most)
    x = jnp.asarray(rng.standard_normal((8, 16, 3)), jnp.float32)
    found, text = sums(module.reduce_scatter, x, {"data": 1, "fsdp": 8}, "fsdp")
    np.testing.assert_allclose(found.reshape(16, 3), np.asarray(x, np.float64).sum(0), atol=1e-5)
    assert ("collective-permute" in text) == permutes
    assert ("reduce-scatter" in text) != permutes
