"""Names of topologies, and the time of their links."""

import dataclasses
import itertools

import pytest

from flowhn_jax.aot.topology import _CHIPS, Topology, describe


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    coords: tuple[int, int, int] = (0, 0, 0)
    slice_index: int | None = None


def torus(kind, *shape, slices=1):
    places = itertools.product(range(slices), *map(range, (*shape, 1, 1)[:3]))
    devices = tuple(Device(i, tuple(place), part) for i, (part, *place) in enumerate(places))
    return Topology("", slices, _CHIPS[kind], shape, devices)


def line(topology, dimension):
    """Return the chips of a slice along one dimension."""
    others = [i for i in range(3) if i != dimension]
    return [
        x for x in topology.devices if not x.slice_index and not any(x.coords[i] for i in others)
    ]


GB = 1e9


@pytest.mark.parametrize(
    ("topology", "dimension", "rate"),
    [
        (torus("v5e", 4, 4), None, 2 * 50 * GB),  # a corner has two links
        (torus("v5e", 4, 4), 0, 50 * GB),
        (torus("v5e", 16, 16), 1, 2 * 50 * GB),  # a ring
        (torus("v5e", 16, 16), None, 4 * 50 * GB),
        (torus("v5e", 8, 16), None, 3 * 50 * GB),
        (torus("v5p", 4, 4, 4), None, 6 * 100 * GB),
        (torus("v5p", 2, 2, 1), None, 2 * 100 * GB),
        (torus("v4", 4, 4, 4), 2, 2 * 50 * GB),
        (torus("v4", 2, 4, 4), 2, 50 * GB),  # not a cube, and so not a torus
        (torus("v5e", 4, 4, slices=2), None, 3.125 * GB * 31),  # one share of 31 by the network
    ],
)
def test_the_rate_at_which_the_slowest_chip_of_a_group_receives(topology, dimension, rate):
    group = topology.devices if dimension is None else line(topology, dimension)
    assert topology.seconds(group, 10 * GB) == pytest.approx(10 * GB / rate)


def test_groups_that_interleave_share_their_links():
    topology = torus("v5e", 4, 4)
    row = line(topology, 0)
    assert topology.seconds(row[::2], GB) == pytest.approx(1.5 * topology.seconds(row, GB))


def test_the_time_is_at_least_the_latency_of_the_hops():
    topology = torus("v5e", 4, 4)
    assert topology.seconds(topology.devices, 4) == pytest.approx(6e-6)
    assert topology.seconds(topology.devices[:2], 4) == pytest.approx(1e-6)
    assert topology.seconds(topology.devices[:1], GB) == 0


@pytest.mark.parametrize(
    ("topology", "steps", "rate"),
    [
        (torus("v5e", 4, 4), 1, 50 * GB / 1.5),  # three pairs a hop apart and one three
        (torus("v5e", 16, 16), 1, 50 * GB),
        (torus("v5e", 16, 16), 4, 50 * GB / 4),
        (torus("v5e", 4, 4, slices=2), 16, 3.125 * GB),
        (Topology("", 1, _CHIPS["h100"], (2, 8), tuple(map(Device, range(8)))), 3, 450 * GB),
    ],
)
def test_pairs_of_devices(topology, steps, rate):
    """Along a row, each device sends to the one `steps` further on."""
    row = list(topology.devices) if steps > 4 else line(topology, 1)
    pairs = [(a, row[(i + steps) % len(row)]) for i, a in enumerate(row)]
    assert topology.seconds_of_pairs(pairs, GB) == pytest.approx(GB / rate)
    assert topology.seconds_of_pairs(pairs, 1) >= topology.chip.latency


def test_gpus_of_one_node_and_of_two():
    topology = Topology("", 1, _CHIPS["h100"], (2, 8), tuple(map(Device, range(16))))
    assert topology.seconds(topology.devices[:8], 9 * GB) == pytest.approx(0.02)
    assert topology.seconds(topology.devices, 15 * GB) == pytest.approx(15 / 450)
    pair = topology.devices[0], topology.devices[8]
    assert topology.seconds(pair, 9 * GB) == pytest.approx(9 / 50)


@pytest.mark.parametrize(
    "name", ["v5e:3x4", "v5e", "v5p:4x4", "v9:2x2", "gpu:h100x9", "gpu:h100x0", "gpu:a100x8", ""]
)
def test_an_unknown_name_lists_the_known_ones(name):
    message = rf"must be one of v4:2x2x1 .*v5e:.* 4x4 .*v6e:.*gpu:h100xN.*; got '{name}'"
    with pytest.raises(ValueError, match=message):
        describe(name)


@pytest.mark.parametrize(("name", "slices"), [("gpu:h100x8", 2), ("v5e:4x4", 0)])
def test_impossible_numbers_of_slices_are_rejected(name, slices):
    with pytest.raises(
        ValueError, match=f"--num_slices must be .* with --topology={name}; got {slices}"
    ):
        describe(name, slices)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "slices", "count", "kind"),
    [
        ("v4:2x2x4", 1, 16, "TPU v4"),
        ("v5e:2x4", 1, 8, "TPU v5 lite"),
        ("v5e:4x4", 2, 32, "TPU v5 lite"),
        ("v5p:16x16x24", 1, 6144, "TPU v5"),
        ("v6e:16x16", 1, 256, "TPU v6 lite"),
    ],
)
def test_devices_of_tpus(name, slices, count, kind):
    pytest.importorskip("libtpu")
    devices = describe(name, slices).devices
    assert len(devices) == count
    assert devices[0].device_kind == kind
    assert len({getattr(device, "slice_index", None) for device in devices}) == slices


@pytest.mark.aot
def test_devices_of_gpus():
    pytest.importorskip("jax_cuda13_plugin")
    topology = describe("gpu:h100x16")
    assert [device.device_kind for device in topology.devices] == ["NVIDIA H100 80GB HBM3"] * 16
    assert topology.shape == (2, 8)
