"""Operations on sequences cut over devices give the results of whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.attention import attention
from kernels.causal_conv import causal_conv
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from tests.kernels.reference import (
    array_sizes,
    assert_close,
    cotangents_like,
    with_gradients,
)
from tests.slow import all_but

BATCH, LENGTH = 2, 24
MESHES = [dict(sequence=4), dict(fsdp=2, sequence=2, tensor=2)]

# Documents that end inside or at the end of a device's positions, or span several devices.
IDS = np.array([[1] * 5 + [2] + [3] * 6 + [4] * 12, [1] * 24], np.int32)


def scan_arguments(array):
    by_token, states = (BATCH, LENGTH, 4), (BATCH, LENGTH, 3)
    return {name: array(*by_token) for name in ("u", "dt", "z")} | {
        "A": -jnp.exp(array(4, 3)),
        "B": array(*states),
        "C": array(*states),
        "D": array(4),
        "dt_bias": array(4),
        "initial_state": array(BATCH, 4, 3),
    }


def ssd_arguments(array):
    by_group = BATCH, LENGTH, 2, 3
    return {
        "x": array(BATCH, LENGTH, 4, 2),
        "dt": array(BATCH, LENGTH, 4),
        "A": -jnp.exp(array(4)),
        "B": array(*by_group),
        "C": array(*by_group),
        "D": array(4),
        "dt_bias": array(4),
        "initial_state": array(BATCH, 4, 2, 3),
    }


def conv_arguments(array):
    return {
        "x": array(BATCH, LENGTH, 4),
        "weight": array(4, 4),
        "bias": array(4),
        "initial_state": array(BATCH, 3, 4),
    }


def attention_arguments(array):
    """Return two key-value heads, which four devices do not divide."""
    kv = BATCH, LENGTH, 2, 8
    return {"q": array(BATCH, LENGTH, 8, 8), "k": array(*kv), "v": array(*kv)}


def over(mesh_axes):
    """Return a mesh with this many devices along each axis."""
    axes = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | mesh_axes
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("axes", MESHES, ids=["sequence", "all"])
@pytest.mark.parametrize("optional", all_but([True], [True, False]), ids=["documents", "plain"])
@pytest.mark.parametrize(
    ("operation", "arguments", "keywords"),
    [
        (selective_scan, scan_arguments, {"return_final_state": True}),
        (ssd, ssd_arguments, {"return_final_state": True}),
        (causal_conv, conv_arguments, {"return_final_state": True}),
        (attention, attention_arguments, {}),
        (attention, attention_arguments, {"window": 5}),
    ],
    ids=["scan", "ssd", "conv", "attention", "window"],
)
def test_outputs_and_gradients(rng, operation, arguments, keywords, optional, axes):
    args = arguments(lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32))
    if optional:
        args["segment_ids"] = jnp.asarray(IDS)
    else:
        args.pop("initial_state", None)
    run = with_gradients(lambda args: operation(**args, **keywords))
    outputs = jax.eval_shape(lambda args: operation(**args, **keywords), args)
    cotangents = cotangents_like(rng, outputs)
    expected = jax.jit(run)(args, cotangents)
    with jax.set_mesh(over(axes)):
        results = jax.jit(run)(args, cotangents)
    assert_close(results, jax.tree.map(np.asarray, expected), 1e-5)


@pytest.mark.parametrize(
    ("operation", "arguments"), [(selective_scan, scan_arguments), (causal_conv, conv_arguments)]
)
def test_no_device_has_all_positions(rng, operation, arguments):
    """Kernels get one device's positions, and no array of all positions is gathered."""
    args = arguments(lambda *shape: jnp.zeros(shape, jnp.float32))
    with jax.set_mesh(over(dict(sequence=4))):
        placed = {
            name: jax.device_put(x, P(None, "sequence")) if x.shape[1:2] == (LENGTH,) else x
            for name, x in args.items()
        }
        cotangents = jax.device_put(jnp.zeros((BATCH, LENGTH, 4)), P(None, "sequence"))
        step = jax.jit(with_gradients(lambda args: operation(**args)))
        text = step.lower(placed, cotangents).compile().as_text()
    assert f"[{BATCH},{LENGTH // 4},4]" in text
    assert f"[{BATCH},{LENGTH},4]" not in text


def test_each_device_has_some_heads_of_all_positions():
    """Each of two key-value heads is on two of four devices."""
    args = attention_arguments(lambda *shape: jnp.zeros(shape, jnp.float32))
    with jax.set_mesh(over(dict(sequence=4))):
        sizes = set(array_sizes(jax.make_jaxpr(lambda args: attention(**args))(args).jaxpr))
    assert BATCH * 2 * LENGTH * LENGTH in sizes  # scores of a device's two query heads
    assert BATCH * 8 * LENGTH * LENGTH not in sizes
