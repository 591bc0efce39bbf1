"""The Triton kernels of state-space duality, in Triton's interpreter on the CPU."""

import functools
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels.ssd import triton as backend
from tests.kernels import triton_interpreter
from tests.kernels.scans import Scan
from tests.kernels.test_ssd import PER_TOKEN, arguments, ssd_inputs
from tests.kernels.triton_checks import needs_triton

pytestmark = needs_triton

run = partial(triton_interpreter.run, module="kernels.ssd.triton_kernels")


@functools.cache
def scan_of(tokens):
    tile = backend.Tile(tokens, warps=4)
    return Scan(lambda args: backend.ssd_with(run, tile, ssd_inputs(args)), formulas.ssd, PER_TOKEN)


SCAN = scan_of(16)


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


@pytest.mark.parametrize("exceptions", [[], ["dt", "C"]])
def test_bfloat16(rng, exceptions):
    args = arguments(rng, 2, 40, 4, 2, jnp.bfloat16, size=16, states=16)
    args |= {name: args[name].astype(np.float32) for name in exceptions}
    # Operands of products are rounded, as XLA rounds them on accelerators, where terms may cancel.
    SCAN.check_against_float64(rng, args, 2e-2, 3e-2)


@pytest.mark.parametrize("tile", ["64,3", "48,4", "256,8"])
def test_a_tile_that_is_not_valid(monkeypatch, tile):
    monkeypatch.setenv("FLOWHN_SSD_TILE", tile)
    args = arguments(np.random.default_rng(0), 1, 2, 4, 2)
    with pytest.raises(ValueError, match=rf"FLOWHN_SSD_TILE .* powers of two.*; got {tile}"):
        backend.ssd(ssd_inputs(args))
