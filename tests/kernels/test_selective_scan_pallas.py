"""The TPU kernels, in Pallas' interpret mode on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowhn_jax.bench import formulas
from kernels.selective_scan import pallas_tpu
from tests.kernels.scans import Scan, scan_arguments, scan_inputs, scan_specs
from tests.kernels.test_selective_scan import PER_TOKEN, last_input

# XLA's CPU compiler takes twice as long if it fuses what the interpreter makes of the kernels.
jit = partial(jax.jit, compiler_options={"xla_disable_hlo_passes": "fusion"})
SCAN = Scan(
    lambda args: pallas_tpu.selective_scan(scan_inputs(args), interpret=True),
    formulas.selective_scan,
    PER_TOKEN,
    jit,
)


@pytest.mark.parametrize(
    ("batch", "length", "width", "states", "optional"),
    [
        pytest.param(2, 1, 5, 3, True, marks=pytest.mark.slow),
        (2, 7, 5, 3, False),
        pytest.param(2, 33, 130, 16, True, marks=pytest.mark.slow),
        (1, 150, 500, 3, True),  # two chunks, the second with two groups
        # One part of five tiles.
        pytest.param(1, 20, 640, 3, True, marks=pytest.mark.slow),
        (1, 5, 2048, 3, False),  # two parts of two tiles
        pytest.param(1, 440, 192, 16, True, marks=pytest.mark.slow),
        pytest.param(3, 584, 192, 16, False, marks=pytest.mark.slow),
        pytest.param(1, 1025, 1536, 16, True, marks=pytest.mark.slow),
        pytest.param(2, 256, 1536, 16, True, marks=pytest.mark.slow),
        pytest.param(2, 300, 256, 32, True, marks=pytest.mark.slow),
        pytest.param(1, 150, 384, 64, True, marks=pytest.mark.slow),
        pytest.param(1, 100, 130, 128, True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients(rng, batch, length, width, states, optional):
    args = scan_arguments(rng, batch, length, width, states, optional=optional)
    SCAN.check_against_float64(rng, args)


def test_bfloat16(rng):
    args = scan_arguments(rng, 2, 33, 130, 16, jnp.bfloat16)
    SCAN.check_against_float64(rng, args, 1e-2, 1e-2)


@pytest.mark.slow
def test_dtypes_may_differ(rng):
    args = scan_arguments(rng, 1, 20, 5, 3)
    args |= {name: args[name].astype(jnp.bfloat16) for name in ("u", "C", "z")}
    SCAN.check_against_float64(rng, args, 1e-2, 1e-2)


def test_large_time_steps_forget_everything(rng):
    args = scan_arguments(rng, 2, 7, 5, 3, optional=False)
    SCAN.check_large_time_steps_forget(rng, args, last_input)


def test_a_document_is_bitwise_alone(rng):
    """Even infinite states do not reach the next document."""
    length, start = 40, 21
    args, others = (scan_arguments(rng, 1, length, 5, 3) for _ in range(2))
    args["segment_ids"] = jnp.asarray(np.arange(length) >= start, jnp.int32)[None]
    others["initial_state"] = jnp.full_like(args["initial_state"], jnp.inf)
    SCAN.check_a_document_is_bitwise_alone(args, others, start)


def test_inside_scan_and_checkpoint(rng):
    args = scan_arguments(rng, 1, 10, 4, 4, optional=False)
    SCAN.check_inside_scan_and_checkpoint(rng, args)


@pytest.mark.slow
def test_sharded_over_batch_and_width(rng):
    args = scan_arguments(rng, 4, 10, 6, 3)
    cotangents = SCAN.cotangents(rng, args)
    expected = formulas.in_float64(formulas.selective_scan, args, cotangents)[1]
    # The interpreter cannot check what varies over devices; tests/aot does, with the compiler.
    SCAN.check_sharded(args, cotangents, scan_specs(args), expected, 1e-4, check_vma=False)


def test_unsupported():
    args = scan_arguments(np.random.default_rng(0), 2, 7, 5, 3)

    def reason(changed):
        return pallas_tpu.unsupported(scan_inputs(args | changed))

    assert reason({}) is None
    assert reason({"u": jax.ShapeDtypeStruct((2, 7, 5), jnp.bfloat16), "z": None}) is None
    assert "u is float16" in reason({"u": args["u"].astype(jnp.float16)})
    assert "129 states" in reason({"A": jnp.ones((5, 129))})
