import jax
import pytest
from jax.sharding import AxisType

from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import axis_sizes, batch_sharding, check_sequence, make_mesh
from tests.small import small_config


def test_one_axis_takes_what_is_left():
    sizes = axis_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 16)
    assert sizes == {"data": 2, "fsdp": 4, "branch": 1, "sequence": 1, "tensor": 2}
    mesh = make_mesh(MeshConfig(fsdp=2, branch=2), 4)
    assert list(mesh.shape.values()) == [2, 2, 2, 1, 1]
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_sharding(mesh).shard_shape((4, 7)) == (1, 7)


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        (
            dict(data=9),
            9,
            r"data=9, fsdp=1, branch=1, sequence=1, tensor=1, which needs 9",
        ),
        (dict(tensor=3), 8, r"must divide the 8 devices; got .*tensor=3, whose product is 3"),
        (dict(data=2, fsdp=2), 6, r"a multiple of mesh.data x mesh.fsdp = 2 x 2.*got 6"),
    ],
)
def test_what_does_not_fit(mesh, batch, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**mesh), batch)


def test_fewer_devices_than_there_are():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), 2)
    assert set(mesh.devices.flat) <= set(jax.devices()[:4])


def test_several_slices_have_data_between_them(monkeypatch):
    """Devices of a slice are together along all other axes."""

    class Device:
        platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

        def __init__(self, i):
            self.id, self.slice_index = i, i // 8
            self.coords, self.core_on_chip = (i % 2, i % 8 // 2, 0), 0

    devices = [Device(i) for i in range(16)]
    with pytest.raises(ValueError, match=r"mesh.data must be a multiple .* slices, 2; got 1"):
        make_mesh(MeshConfig(data=1, fsdp=16), 16, devices)
    seen = {}
    monkeypatch.setattr(
        "flowhn_jax.parallel.mesh.Mesh", lambda array, names, axis_types: seen.update(array=array)
    )
    make_mesh(MeshConfig(data=4, fsdp=-1), 16, devices)
    slices = [[device.slice_index for device in row] for row in seen["array"].reshape(4, 4)]
    assert slices == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


@pytest.mark.parametrize(
    ("axes", "model", "message"),
    [
        (
            dict(sequence=4),
            {"context": 22},
            r"mesh.sequence must divide the 6 tokens of the SSM .* got 4",
        ),
        (dict(sequence=2, tensor=4), {}, r"mesh.tensor must divide model.heads \(4\).* got 8"),
    ],
)
def test_positions_and_heads_that_do_not_divide(axes, model, message):
    split = {"balance": 16 / 22, "align": 1} if model else {"balance": 0.25, "align": 4}
    config = small_config(model=model, split=split)
    mesh = make_mesh(MeshConfig(data=1, **axes), 8)
    with pytest.raises(ValueError, match=message):
        check_sequence(config.model, mesh)
    check_sequence(config.model, make_mesh(MeshConfig(), 8))


def test_branches_and_sequences_do_not_go_together():
    with pytest.raises(ValueError, match=r"mesh.sequence must be 1 where mesh.branch is 2; got 2"):
        MeshConfig(branch=2, sequence=2)
