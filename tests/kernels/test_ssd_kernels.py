"""What the Pallas and the Triton kernels of state-space duality have in common, interpreted."""

from typing import NamedTuple

import pytest

from flowhn_jax.bench import formulas
from tests.kernels import test_ssd_pallas, test_ssd_triton
from tests.kernels.scans import Scan
from tests.kernels.test_ssd import arguments, last_input, ssd_specs
from tests.kernels.triton_checks import needs_triton


class Kernels(NamedTuple):
    """A backend.

    Attributes:
      scan: runs it.
      length: tokens that its chunks do not divide.
      cut: one of them, from which on a second call continues.
      check_vma: whether `jax.shard_map` can check what varies over devices. Pallas' interpreter
        cannot; tests/aot does, with the compiler.
    """

    scan: Scan
    length: int
    cut: int
    check_vma: bool


KERNELS = {
    "pallas_tpu": Kernels(test_ssd_pallas.SCAN, length=200, cut=71, check_vma=False),
    "triton": Kernels(test_ssd_triton.SCAN, length=40, cut=21, check_vma=True),
}


@pytest.fixture(params=["pallas_tpu", pytest.param("triton", marks=needs_triton)])
def kernels(request):
    return KERNELS[request.param]


def test_large_time_steps_forget_everything(rng, kernels):
    args = arguments(rng, 2, 20, 4, 2, optional=False)
    kernels.scan.check_large_time_steps_forget(rng, args, last_input)


def test_two_calls_continue_one(rng, kernels):
    args = arguments(rng, 2, kernels.length, 4, 2)
    kernels.scan.check_two_calls_continue_one(args, kernels.cut, 1e-5)


def test_a_document_is_bitwise_alone(rng, kernels):
    kernels.scan.check_the_second_document_is_bitwise_alone(
        rng, lambda: arguments(rng, 1, kernels.length, 2, 1)
    )


def test_inside_scan_and_checkpoint(rng, kernels):
    args = arguments(rng, 1, 20, 4, 2, optional=False)
    kernels.scan.check_inside_scan_and_checkpoint(rng, args)


@pytest.mark.parametrize("groups", [1, 2])
def test_sharded_over_batch_and_heads(rng, kernels, groups):
    args = arguments(rng, 4, 20, 4, groups)
    cotangents = kernels.scan.cotangents(rng, args)
    expected = formulas.in_float64(formulas.ssd, args, cotangents)[1]
    kernels.scan.check_sharded(
        args, cotangents, ssd_specs(groups), expected, 1e-4, check_vma=kernels.check_vma
    )
