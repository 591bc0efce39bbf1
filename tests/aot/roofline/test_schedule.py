"""Time lines of scheduled programs, written by hand as XLA writes them."""

import types

import pytest

from flowhn_jax.aot.collectives import Transfer
from flowhn_jax.aot.hlo import Program, arrays
from flowhn_jax.aot.roofline.bound import bound
from flowhn_jax.aot.roofline.categories import COLLECTIVES, MOVES, OTHER
from flowhn_jax.aot.roofline.rates import Rates
from flowhn_jax.aot.roofline.timeline import Timeline
from flowhn_jax.aot.roofline.work import Workload

RATES = Rates(flops=1e12, bandwidth=1e9)
MIB = 2**20

# y = x + x, 1 MiB each, next to an all-reduce of c and a copy of d to VMEM.
TEXT = """HloModule jit_f, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %total = f32[] add(%a, %b)
}

ENTRY %main (x: f32[512,512], c: f32[512,512], d: f32[512,512]) -> f32[512,512] {
  %x = f32[512,512]{1,0:T(8,128)} parameter(0)
  %c = f32[512,512]{1,0:T(8,128)} parameter(1)
  %d = f32[512,512]{1,0:T(8,128)} parameter(2)
  %start = f32[512,512]{1,0:T(8,128)} all-reduce-start(%c), replica_groups={{0,1}}, to_apply=%sum
  %fetch = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]) copy-start(%d)
  %y = f32[512,512]{1,0:T(8,128)} add(%x, %x)
  %z = f32[512,512]{1,0:T(8,128)} multiply(%y, %y)
  %d1 = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %c1 = f32[512,512]{1,0:T(8,128)} all-reduce-done(%start)
  ROOT %c2 = f32[512,512]{1,0:T(8,128)} all-reduce(%z), replica_groups={{0,1}}, to_apply=%sum
}
"""


def entries_of(text, seconds):
    """Return the entries of a program at a gigabyte per second, by name of the instruction."""
    program = Program(text)
    workload = Workload(program)
    transfers = {
        (program.entry, name): Transfer("all-reduce", 0, each) for name, each in seconds.items()
    }

    def price(computation, instruction, work):
        return work.moved / RATES.bandwidth, "bytes"

    return {
        (entry.instruction.name, entry.limit): entry
        for entry in Timeline(program, workload, price, transfers).entries()
        if entry.seconds
    }


def test_what_outlasts_the_instructions_between_start_and_done_is_exposed():
    """Between the two are 6 MiB: x twice and y, then y twice and z."""
    between = 6 * MIB / RATES.bandwidth
    found = entries_of(TEXT, {"start": between + 0.25, "c2": 0.5})
    assert found.pop(("y", "bytes")).seconds == pytest.approx(between / 2)
    assert found.pop(("z", "bytes")).seconds == pytest.approx(between / 2)
    assert found.pop(("c1", "links")).seconds == pytest.approx(0.25)
    assert found.pop(("c2", "links")).seconds == 0.5
    assert not found  # the copy of 1 MiB is hidden


def test_a_hidden_collective_takes_no_time():
    found = entries_of(TEXT, {"start": 1e-3, "c2": 0.0})
    assert set(found) == {("y", "bytes"), ("z", "bytes")}


def test_collectives_wait_for_each_other():
    second = TEXT.replace("%start =", "%first = f32[512,512]{1,0:T(8,128)} all-reduce-start(%d), "
                          "to_apply=%sum\n  %start =")  # fmt: skip
    between = 6 * MIB / RATES.bandwidth
    found = entries_of(second, {"first": between, "start": 0.125, "c2": 0.0})
    assert found["c1", "links"].seconds == pytest.approx(0.125)


def test_a_copy_that_is_needed_at_once_is_exposed():
    soon = TEXT.replace("add(%x, %x)", "add(%x, %d1)")
    done = "  %d1 = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%fetch)\n"
    soon = soon.replace(done, "").replace("  %y =", done + "  %y =")
    found = entries_of(soon, {})
    assert found["d1", "bytes"].seconds == pytest.approx(MIB / RATES.bandwidth)
    # y reads x alone from main memory.
    assert found["y", "bytes"].seconds == pytest.approx(2 * MIB / RATES.bandwidth)


def test_categories_of_what_has_no_source():
    topology = types.SimpleNamespace(seconds=lambda group, received: received / 1e9)
    found = bound(TEXT, RATES, 1.0, links=(topology, ["chip 0", "chip 1"]))
    exposed = 2 * MIB / 1e9  # an all-reduce of two devices receives each byte once; both wait
    assert found.parts[OTHER].gigabytes == pytest.approx(6 * MIB / 1e9)
    assert found.parts[OTHER].milliseconds == pytest.approx(6e3 * MIB / 1e9)
    assert found.parts[MOVES].gigabytes == pytest.approx(MIB / 1e9)
    assert found.parts[MOVES].milliseconds == 0
    assert found.overlapped_gigabytes == pytest.approx(MIB / 1e9)
    assert found.link_milliseconds == pytest.approx(1e3 * exposed)
    # The first is hidden by y and z.
    assert found.parts[COLLECTIVES].milliseconds == pytest.approx(1e3 * exposed / 2)


@pytest.mark.parametrize(
    ("result", "padded"),
    [
        ("f32[16,576,24]{2,1,0:T(8,128)}", 16 * 576 * 128 * 4),
        ("f32[16,576,24]{1,2,0:T(8,128)}", 16 * 640 * 24 * 4),
        ("bf16[3,130]{1,0:T(8,128)(2,1)}", 8 * 256 * 2),
        ("bf16[3]{0:T(1024)(128)(2,1)}", 1024 * 2),
        ("f32[]{:T(128)}", 4),
        ("f32[3,5]{1,0}", 60),
        ("pred[7]", 7),
    ],
)
def test_padding_of_tiles(result, padded):
    (array,) = arrays(result)
    assert array.padded_bytes == padded


def test_an_elementwise_operation_moves_the_padding():
    text = TEXT.replace("512,512", "4096,24")
    found = bound(text, RATES, 1.0)
    assert found.parts[OTHER].gigabytes == pytest.approx(6 * 4096 * 128 * 4 / 1e9)
