"""Collectives of a program, counted from its text."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from flowhn_jax.aot.collectives import replica_groups, traffic
from flowhn_jax.aot.hlo import Program
from tests.aot.test_topology import torus

MESH = (2, 4)


def compiled(function):
    mesh = jax.make_mesh(MESH, ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    run = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    return Program(jax.jit(run).lower(jnp.ones((8 * 16, 3))).compile().as_text())


def permute(x, step):
    return lax.ppermute(x, "b", [(i, (i + step) % 4) for i in range(4)])


OWN = 16 * 3 * 4  # bytes of a device's part

CASES = {
    "all-gather": (lambda x: x * lax.all_gather(x, "b").sum(), 1, 3 * OWN),
    "all-reduce": (lambda x: lax.psum(x, "b") * x, 1, 2 * 3 / 4 * OWN),
    "reduce-scatter": (
        lambda x: jnp.tile(lax.psum_scatter(x, "b", tiled=True), (4, 1)),
        1,
        3 / 4 * OWN,
    ),
    "all-to-all": (lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), 1, 3 / 4 * OWN),
    "collective-permute": (
        lambda x: lax.fori_loop(0, 7, lambda _, x: permute(jnp.sin(x), 1), x),
        7,
        7 * OWN,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_counts_and_bytes(kind):
    function, count, received = CASES[kind]
    machine = torus("v5e", *MESH)
    found = traffic(compiled(function), machine.devices, machine)
    assert list(found) == [kind]
    assert found[kind].count == count
    assert found[kind].received == received
    assert found[kind].seconds > 0


def test_permutations_in_opposite_directions_overlap():
    machine = torus("v5e", *MESH)
    one = traffic(compiled(partial(permute, step=1)), machine.devices, machine)
    both = compiled(lambda x: permute(x, 1) * permute(x, -1))
    both = traffic(both, machine.devices, machine)
    (one,), (both,) = one.values(), both.values()
    assert both.received == 2 * one.received
    assert both.seconds == pytest.approx(one.seconds)


def test_a_swap_is_not_its_own_opposite():
    machine = torus("v5e", *MESH)
    swap = compiled(lambda x: lax.ppermute(x, "a", [(0, 1), (1, 0)]))
    (found,) = traffic(swap, machine.devices, machine).values()
    pair = machine.devices[0], machine.devices[4]
    assert found.seconds == machine.seconds_of_pairs([pair], OWN)


def test_parts_of_one_collective_in_several_fusions_count_once():
    gather = (
        "f32[8]{0} all-gather(%p), channel_id=CHANNEL, replica_groups={{0,1,2,3}}, dimensions={0}, "
        'frontend_attributes={chain_id="3"}'
    )
    fusions = "".join(
        f"%part.{i} (p: f32[2]) -> f32[8] {{\n  %p = f32[2]{{0}} parameter(0)\n"
        f"  ROOT %gather.{i} = {gather.replace('CHANNEL', channel)}\n}}\n\n"
        for i, channel in enumerate("557")
    )
    lines = "".join(
        f"  %step.{i} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%part.{i}\n" for i in range(3)
    )
    text = f"HloModule f\n\n{fusions}ENTRY %main (x: f32[2]) -> f32[8] {{\n"
    text += f"  %x = f32[2]{{0}} parameter(0)\n{lines}}}\n"
    machine = torus("v5e", 2, 2)
    (found,) = traffic(Program(text), machine.devices, machine).values()
    assert found[:2] == (2, 2 * 3 * 8)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, dimensions", [[0, 1], [2, 3]]),
        ("{}, dimensions", [[0, 1, 2, 3]]),
        ("[2,2]<=[4], dimensions", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0), dimensions", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'y'}, dimensions", [[0, 1], [2, 3]]),
        ("mesh['x'=2,'y'=2] {'x'}, dimensions", [[0, 2], [1, 3]]),
        ("mesh['x'=2,'y'=2] {'x','y'}, dimensions", [[0, 1, 2, 3]]),
        ("mesh['x'=4] {'x':(1)2}, dimensions", [[0, 2], [1, 3]]),
        ("mesh['x'=4] {'x':(2)2}, dimensions", [[0, 1], [2, 3]]),
    ],
)
def test_groups_in_all_forms_that_xla_writes(text, groups):
    found = replica_groups(f"channel_id=1, replica_groups={text}", 4)
    assert sorted(map(sorted, found)) == groups


def test_groups_of_an_unknown_form_are_rejected():
    with pytest.raises(ValueError, match="has an unknown form: 'other"):
        replica_groups("replica_groups=other", 4)
