"""The Triton scans up to their kernels, which need neither a GPU nor Triton."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selective_scan import triton as selective_scan
from kernels.ssd import triton as ssd
from tests.kernels import scans, test_ssd
from tests.kernels.reference import with_gradients
from tests.kernels.scans import scan_inputs
from tests.kernels.test_ssd import ssd_inputs
from tests.kernels.triton_checks import check_refusals, check_what_is_timed, launches

TILE = selective_scan.Tile(tokens=8, channels=32, warps=2)


@pytest.mark.parametrize("optional", [True, False])
def test_states_are_kept_only_for_the_gradient(rng, optional):
    args = scans.scan_arguments(rng, 2, 40, 70, 3, jnp.bfloat16, optional=optional)

    def scan(run, args):
        return selective_scan.scan_with(run, TILE, scan_inputs(args))

    (forward,) = launches(scan, args)
    assert forward.outputs["starts"].shape == (1,)
    assert not forward.constants["KEEPS_STARTS"]
    forward, backward = launches(lambda run, args: with_gradients(partial(scan, run))(args), args)
    assert forward.outputs["starts"].shape == (2, 5, 3, 70)
    assert forward.constants["KEEPS_STARTS"]
    assert backward.grid == (3, 2)
    assert backward.outputs["dB"].shape == (3, 2, 3, 40)


def test_what_is_launched(rng):
    """The states at the borders of the chunks are in x's dtype; sums are over heads, not chunks."""
    args = test_ssd.arguments(rng, 2, 200, 6, 2, jnp.bfloat16, size=24, states=130)

    def gradients(run, args):
        tile = ssd.Tile(64, 8)
        return with_gradients(lambda args: ssd.ssd_with(run, tile, ssd_inputs(args)))(args)

    found = {launch.kernel: launch for launch in launches(gradients, args)}
    assert {name: launch.grid for name, launch in found.items()} == {
        "states_forward": (6, 2, 3),
        "tokens_forward": (6, 4, 2),
        "states_backward": (6, 2, 3),
        "tokens_backward": (6, 4, 2),
        "group_sums": (4, 3, 4),
    }
    starts = found["states_forward"].outputs["starts"]
    assert (starts.shape, starts.dtype) == ((2, 6, 4, 24, 130), jnp.bfloat16)
    assert found["group_sums"].outputs["dB"].shape == (2, 200, 2, 130)


def reason(operation, **changed):
    """Return why small arguments, with some changed, are refused."""
    rng = np.random.default_rng(0)
    if operation == "ssd":
        shapes = jax.eval_shape(lambda: test_ssd.arguments(rng, 1, 2, 4, 2))
        return ssd.unsupported(ssd_inputs(shapes | changed))
    shapes = jax.eval_shape(lambda: scans.scan_arguments(rng, 1, 2, 3, 4))
    return selective_scan.unsupported(scan_inputs(shapes | changed))


@pytest.mark.parametrize(
    ("operation", "name", "shape", "dtype", "message"),
    [
        ("selective_scan", "z", (1, 2, 3), "float16", "z is float16, not bfloat16 or float32"),
        ("selective_scan", "u", (65536, 2, 3), "float32", "the batch size 65536 is above 65535"),
        ("selective_scan", "A", (3, 0), "float32", "u (1, 2, 3) or A (3, 0) is empty"),
        ("ssd", "C", (1, 2, 2, 4), "float16", "C is float16, not bfloat16 or float32"),
        ("ssd", "x", (32768, 2, 4, 3), "float32", "the batch size 32768 times 2 groups is above"),
        ("ssd", "x", (1, 2, 4, 129), "float32", "it has 129 channels per head, more than 128"),
    ],
)
def test_refusals(monkeypatch, operation, name, shape, dtype, message):
    check_refusals(monkeypatch, partial(reason, operation))
    assert message in reason(operation, **{name: jax.ShapeDtypeStruct(shape, dtype)})


def test_what_is_timed(rng):
    args = scans.scan_arguments(rng, 2, 40, 70, 3, jnp.bfloat16) | {"dt_bias": None}
    check_what_is_timed(selective_scan.timed(TILE), scan_inputs(args))
    args = test_ssd.arguments(rng, 2, 40, 4, 2, jnp.bfloat16) | {"dt_bias": None}
    check_what_is_timed(ssd.timed(ssd.DEFAULT), ssd_inputs(args))
