"""Static schedules of Pallas kernels."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.roofline import bundles
from flowhn_jax.aot.roofline.bound import bound, pallas_kernels
from flowhn_jax.aot.roofline.pallas_schedule import Kernel, kernel_seconds
from tests.aot.roofline.programs import compiled_text, rates_of

# As libtpu writes it: a grid of 12 steps and two that fill and drain its pipeline, in it a loop of
# at most eight rounds, whose limit is the smaller of 128 and what is left, in groups of 16.
TEXT = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s50_s2 = sphi %s1, %s51_s2 /* iteration index, stage = 0 */ }
   0x2   : > { %s20_s3 = ssub.s32 448, %s19_s1  ;;  %v1_v1 = vld [vmem:[%s9] sm:$0xff] }
   0x3   : > { %p21_p1 = scmp.lt.s32.totalorder %s20_s3, 128 }
   0x4   : > { %s22_s4 = smov.u32 (!%p21_p1, %s20_s3), 128 }
   0x5   : > { %s23_s5 = sadd.s32 15, %s22_s4  ;;  %s29 = sbr.rel (%p21_p1) target = $region9 }
   0x6   : > { %s24_s6 = sshra.s32 %s23_s5, 4 }
   0x7 LB: >> { %s30_s7 = sadd.s32 1, %s31_s7  ;;  %v2_v2 = vmul.f32 %v1_v1, %v1_v1 }
   0x8   : >> { %p32_p4 = scmp.ge.s32.totalorder %s30_s7, %s24_s6 }
   0x9   : > { %v9_v9 = vmov %v2_v2 }
   0xa   : >> { %33 = sbr.rel (!%p32_p4) target = $region5 }
   0xb   :  {}
   0xc PF: > { %s51_s2 = sadd.s32 1, %s50_s2 }
   0xd   : > { %p60_p0 = scmp.ge.s32.totalorder %s51_s2, 14 /* loop exit test */ }
   0xe   : > { %61 = sbr.rel (!%p60_p0) target = $region2 }
   0xf   :  { %62 = vsyncpa [#allocation4], 1 }
"""


def test_bundles_count_as_often_as_their_loops_run():
    grid, rounds = 12, 8
    # The bundle that was moved into the inner loop is part of it; the one after it is not.
    assert bundles.cycles(TEXT) == 2 + grid * (6 + rounds * 4 + 4)


def test_a_loop_of_unknown_limit_counts_once():
    unknown = TEXT.replace("ssub.s32 448, %s19_s1", "sld [smem:[#allocation2]]")
    unknown = unknown.replace("(!%p21_p1, %s20_s3), 128", "%s20_s3")
    assert bundles.cycles(unknown) == 2 + 12 * (6 + 4 + 4)


def kernel_of_grid(steps):
    """Return a function that runs a kernel of this number of steps, and its array."""

    def body(x, y):
        y[...] = jnp.sin(x[...]) * x[...]

    block = pl.BlockSpec((64, 128), lambda i: (i, 0))
    array = (64 * steps, 128), jnp.float32
    call = pl.pallas_call(
        body,
        grid=(steps,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(*array),
    )
    return call, array


@pytest.mark.aot
def test_cycles_of_a_kernel_grow_with_its_grid():
    target, grids = "v5e:2x2", (8, 16, 32)
    texts = [compiled_text(target, *kernel_of_grid(steps)) for steps in grids]
    kernels = [pallas_kernels(Program(text))[0] for text in texts]
    rates = rates_of(target)
    found = kernel_seconds(kernels, target, rates.clock)
    short, middle, long = (found[kernel] for kernel in kernels)
    step = (middle - short) / 8
    assert long - middle == pytest.approx(16 * step)
    # A step computes 8 registers of 1,024 numbers, at least ten operations each, four per cycle.
    assert 8 * 10 / 4 < step * rates.clock < 8 * 500
    priced = bound(texts[2], rates, 1.0, schedules=found)
    assert priced.kernels_by_schedule
    assert priced.heaviest[0].limit == "schedule"
    assert priced.heaviest[0].milliseconds == pytest.approx(1e3 * long)
    by_bytes = bound(texts[2], rates, 1.0)
    assert not by_bytes.kernels_by_schedule
    assert by_bytes.milliseconds < priced.milliseconds


@pytest.mark.aot
def test_a_kernel_that_does_not_compile_alone_is_missing():
    text = compiled_text("v5e:2x2", *kernel_of_grid(4))
    (kernel,) = pallas_kernels(Program(text))
    broken = Kernel('{"custom_call_config": {}}', kernel.operands, kernel.results)
    found = kernel_seconds([broken, kernel], "v5e:2x2", 1e9)
    assert broken not in found
