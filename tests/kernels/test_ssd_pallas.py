"""The TPU kernels of state-space duality, in Pallas' interpret mode on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.ssd
from flowhn_jax.bench import formulas
from kernels.backends import Backend, Operation
from kernels.ssd import pallas_tpu
from tests.kernels.reference import assert_close, with_gradients
from tests.kernels.scans import Scan
from tests.kernels.test_sequence import over
from tests.kernels.test_ssd import PER_TOKEN, arguments, ssd_inputs

interpreted = partial(pallas_tpu.ssd, interpret=True)
SCAN = Scan(lambda args: interpreted(ssd_inputs(args)), formulas.ssd, PER_TOKEN)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "states", "optional"),
    [
        (1, 2, 1, 3, 4, True),
        (130, 4, 2, 3, 4, False),
        (300, 16, 2, 16, 20, True),  # one block of heads per group
        (256, 18, 1, 64, 16, True),  # three blocks of six
        pytest.param(440, 24, 1, 64, 128, True, marks=pytest.mark.slow),
        pytest.param(584, 6, 2, 24, 130, False, marks=pytest.mark.slow),
        pytest.param(200, 3, 3, 130, 256, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, length, heads, groups, size, states, optional):
    args = arguments(rng, 2, length, heads, groups, size=size, states=states, optional=optional)
    SCAN.check_against_float64(rng, args)


def test_heads_of_a_group_in_several_parts(rng, monkeypatch):
    """Gradients of B and C are summed over the parts whose states do not fit in VMEM together."""
    monkeypatch.setattr(pallas_tpu, "_STATE_BYTES", 1)
    args = arguments(rng, 1, 130, 32, 2, size=16)
    scan = Scan(SCAN.function, formulas.ssd, PER_TOKEN)
    assert pallas_tpu._sizes(32, 2, 16, 4).parts == 4
    scan.check_against_float64(rng, args)


def test_bfloat16(rng):
    args = arguments(rng, 2, 200, 4, 2, jnp.bfloat16, size=16, states=16)
    # Operands of products are rounded, as XLA rounds them on accelerators, where terms may cancel.
    SCAN.check_against_float64(rng, args, 2e-2, 3e-2)


def test_over_a_mesh_of_eight_devices(rng, monkeypatch):
    """The operation cuts sequences, positions and heads, and hands the kernels their parts."""
    operation = Operation("ssd", {"kernels": Backend(interpreted)}, {"cpu": ("kernels",)})
    monkeypatch.setattr(kernels.ssd, "OPERATION", operation)
    args = arguments(rng, 2, 48, 4, 2)
    cotangents = SCAN.cotangents(rng, args)
    run = with_gradients(lambda args: kernels.ssd.ssd(**args, return_final_state=True))
    with jax.set_mesh(over(dict(fsdp=2, sequence=2, tensor=2))):
        found = jax.jit(run)(args, cotangents)
    assert_close(found, formulas.in_float64(formulas.ssd, args, cotangents), 1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "size", "states", "expected"),
    [
        (24, 1, 64, 128, (64, 128, 8, 3, 1)),  # Mamba-2 130M
        (64, 1, 64, 256, (64, 256, 8, 8, 1)),  # Falcon-H1 1B
        (128, 1, 64, 256, (64, 256, 8, 8, 2)),
        (24, 8, 64, 64, (128, 128, 3, 1, 8)),
        (16, 4, 24, 16, (32, 128, 4, 1, 4)),
        (2, 1, 130, 256, (192, 256, 2, 1, 1)),
    ],
)
def test_how_heads_are_divided(heads, groups, size, states, expected):
    sizes = pallas_tpu._sizes(heads, groups, size, states)
    assert (sizes.size, sizes.states, sizes.block, sizes.blocks, sizes.parts) == expected
    assert sizes.block * sizes.blocks * sizes.parts == heads


def test_unsupported():
    args = arguments(np.random.default_rng(0), 2, 7, 4, 2)

    def reason(changed):
        return pallas_tpu.unsupported(ssd_inputs(args | changed))

    assert reason({}) is None
    assert reason({"x": jax.ShapeDtypeStruct((2, 7, 4, 64), jnp.bfloat16)}) is None
    assert "x is float16" in reason({"x": args["x"].astype(jnp.float16)})
    assert "257 channels per head and 4 states" in reason({"x": jnp.ones((2, 7, 4, 257))})
    wide = jnp.ones((2, 7, 2, 257))
    assert "3 channels per head and 257 states" in reason({"B": wide, "C": wide})
