"""The Triton kernels of state-space duality, in Triton's interpreter on the CPU."""

import functools
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels import triton_call
from kernels.scan_tiles import forward_and_backward
from kernels.ssd import triton as backend
from tests.kernels import triton_interpreter
from tests.kernels.scans import Scan
from tests.kernels.test_selective_scan_triton import launches
from tests.kernels.test_ssd import PER_TOKEN, arguments, last_input, ssd_inputs, ssd_specs

interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
run = partial(triton_interpreter.run, module="kernels.ssd.triton_kernels")


@functools.cache
def scan_of(tokens):
    tile = backend.Tile(tokens, warps=4)
    return Scan(lambda args: backend.ssd_with(run, tile, ssd_inputs(args)), formulas.ssd, PER_TOKEN)


SCAN = scan_of(16)


@interpreted
@pytest.mark.parametrize(
    ("tokens", "length", "heads", "groups", "size", "states", "optional"),
    [
        (16, 1, 2, 1, 3, 4, True),
        (16, 33, 4, 2, 3, 4, False),
        (32, 70, 4, 1, 16, 20, True),
        (64, 70, 2, 2, 20, 130, True),
        pytest.param(64, 440, 6, 1, 64, 128, True, marks=pytest.mark.slow),
        pytest.param(64, 200, 2, 1, 128, 256, False, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, tokens, length, heads, groups, size, states, optional):
    args = arguments(rng, 2, length, heads, groups, size=size, states=states, optional=optional)
    scan_of(tokens).check_against_float64(rng, args)


@interpreted
@pytest.mark.parametrize("exceptions", [[], ["dt", "C"]])
def test_bfloat16(rng, exceptions):
    args = arguments(rng, 2, 40, 4, 2, jnp.bfloat16, size=16, states=16)
    args |= {name: args[name].astype(np.float32) for name in exceptions}
    # Operands of products are rounded, as XLA rounds them on accelerators, where terms may cancel.
    SCAN.check_against_float64(rng, args, 2e-2, 3e-2)


@interpreted
def test_large_time_steps_forget_everything(rng):
    args = arguments(rng, 2, 20, 4, 2, optional=False)
    SCAN.check_large_time_steps_forget(rng, args, last_input)


@interpreted
def test_two_calls_continue_one(rng):
    SCAN.check_two_calls_continue_one(arguments(rng, 2, 40, 4, 2), 21, 1e-5)


@interpreted
def test_a_document_is_bitwise_alone(rng):
    args, others = (arguments(rng, 1, 40, 2, 1) for _ in range(2))
    start = int(rng.integers(1, 40))
    args["segment_ids"] = jnp.asarray(np.arange(40) >= start, jnp.int32)[None]
    SCAN.check_a_document_is_bitwise_alone(args, others, start)


@interpreted
def test_inside_scan_and_checkpoint(rng):
    SCAN.check_inside_scan_and_checkpoint(rng, arguments(rng, 1, 20, 4, 2, optional=False))


@interpreted
@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_over_batch_and_heads(rng, groups):
    args = arguments(rng, 4, 20, 4, groups)
    cotangents = SCAN.cotangents(rng, args)
    expected = formulas.in_float64(formulas.ssd, args, cotangents)[1]
    SCAN.check_sharded(args, cotangents, ssd_specs(groups), expected, 1e-4)


def test_what_is_launched(rng):
    """The states at the borders of the chunks are in x's dtype; sums are over heads, not chunks."""
    args = arguments(rng, 2, 200, 6, 2, jnp.bfloat16, size=24, states=130)

    def gradient(run, floats):
        scan = partial(backend.ssd_with, run, backend.Tile(64, 8))
        outputs, vjp = jax.vjp(lambda floats: scan(ssd_inputs(args | floats)), floats)
        return vjp(outputs)

    floats = {name: x for name, x in args.items() if name != "segment_ids"}
    found = {launch.kernel: launch for launch in launches(gradient, floats)}
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


def test_refusals(monkeypatch):
    args = arguments(np.random.default_rng(0), 1, 2, 4, 2)
    shapes = jax.eval_shape(lambda: args)

    def reason(**changed):
        return backend.unsupported(ssd_inputs(shapes | changed))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "the compute capability of cpu is not known" in reason()
    monkeypatch.setattr(triton_call, "target_capability", lambda: 75)
    assert "it needs a compute capability of 80, this GPU's is 75" in reason()
    monkeypatch.setattr(triton_call, "target_capability", lambda: 90)
    assert reason() is None
    half = jax.ShapeDtypeStruct((1, 2, 2, 4), jnp.float16)
    assert reason(C=half) == "C is float16, not bfloat16 or float32"
    assert "batch size 32768 times 2 groups" in reason(
        x=jax.ShapeDtypeStruct((32768, 2, 4, 3), jnp.float32)
    )
    wide = jax.ShapeDtypeStruct((1, 2, 4, 129), jnp.float32)
    assert "129 channels per head" in reason(x=wide)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "jax_triton" or None)
    assert "the package jax-triton is not installed" in reason()


def test_what_is_timed(rng):
    """Through jax-triton, as far as a machine without a GPU goes: to the shapes."""
    pytest.importorskip("jax_triton", exc_type=ImportError)
    args = arguments(rng, 2, 40, 4, 2, jnp.bfloat16)
    del args["dt_bias"]
    shapes = jax.eval_shape(lambda: list(ssd_inputs(args)))
    present = [x for x in shapes if x is not None]
    results = jax.eval_shape(
        partial(forward_and_backward, backend.timed(backend.DEFAULT), shapes), *present
    )
    names = ["x", "dt", "A", "B", "C", "D", "initial_state"]  # without integers
    assert [x.shape for x in results] == [args[name].shape for name in names]


@interpreted
@pytest.mark.parametrize("tile", ["64,3", "48,4", "256,8"])
def test_a_tile_that_is_not_valid(monkeypatch, tile):
    monkeypatch.setenv("FLOWHN_SSD_TILE", tile)
    args = arguments(np.random.default_rng(0), 1, 2, 4, 2)
    with pytest.raises(ValueError, match=rf"FLOWHN_SSD_TILE .* powers of two.*; got {tile}"):
        backend.ssd(ssd_inputs(args))
