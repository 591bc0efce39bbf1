"""Train steps compiled for whole machines."""

import dataclasses
import json

import pytest

from flowhn_jax import flops, models
from flowhn_jax.aot.step_report import largest_batch, report
from flowhn_jax.aot.topology import describe
from flowhn_jax.config import MeshConfig
from tests.aot import tpu_target
from tests.small import small_config

pytestmark = pytest.mark.aot


def config_for_tpus(sequences=64, **axes):
    model = {"dtype": "auto", "context": 128, "width": 128, "mlp_width": 256, "blocks": 1}
    model |= {"vocab_size": 512, "heads": 8, "kv_heads": 2}
    config = small_config("fai_split", model=model, train={"batch_size": sequences})
    return dataclasses.replace(config, mesh=MeshConfig(**{"data": 1} | axes))


def topology(name="v5e:4x4", slices=1):
    tpu_target.devices("v5e:2x2")  # or skips the test
    return describe(name, slices)


@pytest.mark.parametrize(
    ("axes", "name", "slices"),
    [
        (dict(data=2, fsdp=-1), "v5e:4x4", 1),
        pytest.param(dict(data=4, fsdp=8), "v5e:4x4", 2, marks=pytest.mark.slow),
        pytest.param(dict(fsdp=2, sequence=4, tensor=2), "v6e:4x4", 1, marks=pytest.mark.slow),
        pytest.param(dict(fsdp=4, branch=2, tensor=2), "v5p:2x2x4", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_that_fits(axes, name, slices):
    config, machine = config_for_tpus(**axes), topology(name, slices)
    found = report(config, machine)
    assert found.fits
    assert found.kernels == "attention splash, cross_entropy xla, selective_scan pallas_tpu"
    params = models.param_count(config.model)
    shards = found.mesh["fsdp"] * found.mesh["sequence"] * found.mesh["tensor"]
    assert 4 * params / shards <= found.memory.parameters < 4 * params / shards * 1.4
    assert found.memory.total == found.needed
    expected = 64 * flops.train_flops(config.model, 128)
    assert found.step_flops == expected
    peak = flops.peak_flops(machine.devices[0])
    assert found.compute_seconds == expected / len(machine.devices) / peak / 0.5
    # Each device receives at least the other devices' parameters, in bfloat16.
    received = sum(each.received for each in found.traffic.values())
    assert received > 2 * (params - 512 * 128) / found.mesh["tensor"] * (1 - 1 / shards) / 2
    assert ("send" in found.traffic) == (slices == 2)
    assert 0 < found.communication_share < 1
    assert json.loads(json.dumps(found.to_dict()))["memory"]["parameters"] > 0
    assert "the step fits" in str(found)
    assert f"{found.chips} chips" in str(found)


def test_a_step_that_does_not_fit():
    config = config_for_tpus(2**20, fsdp=-1)
    found = report(config, topology("v5e:2x2"))
    assert not found.fits
    assert found.memory is None
    assert found.needed > found.topology.chip.memory
    assert "the step does not fit" in str(found)
    assert found.to_dict()["memory"] is None


def test_a_plan_is_the_program_without_its_code():
    config, machine = config_for_tpus(fsdp=-1), topology()
    planned, whole = (report(config, machine, plan_only=plan) for plan in (True, False))
    assert planned.is_plan
    assert not whole.is_plan
    assert planned.traffic == whole.traffic
    assert planned.kernels == whole.kernels
    data = [each.needed - each.memory.program for each in (planned, whole)]
    assert data[0] == pytest.approx(data[1], abs=2**18)
    assert planned.memory.program > whole.memory.program
    assert planned.memory.activations == whole.memory.activations
    assert "planned in" in str(planned)


@pytest.mark.slow
def test_the_largest_batch():
    machine = topology("v5e:2x2")
    found = largest_batch(config_for_tpus(2**17, fsdp=-1), machine, plan_only=True)
    assert found.fits
    each = found.sequences // 4
    assert each & (each - 1) == 0
    twice = config_for_tpus(2 * found.sequences, fsdp=-1)
    assert not report(twice, machine, plan_only=True).fits


def test_a_mesh_that_does_not_fit_the_machine():
    with pytest.raises(ValueError, match=r"than the 16 devices available; .* which needs 32"):
        report(config_for_tpus(fsdp=32), topology())
    with pytest.raises(ValueError, match=r"x mesh.tensor must divide model.heads .* got 16"):
        report(config_for_tpus(sequence=8, tensor=2), topology())


def test_programs_for_gpus_are_compiled_whole():
    pytest.importorskip("jax_cuda13_plugin")
    with pytest.raises(ValueError, match="needs a --topology of TPUs"):
        report(config_for_tpus(fsdp=-1), describe("gpu:h100x8"), plan_only=True)
    with pytest.raises(ValueError, match="needs a --topology of TPUs"):
        largest_batch(config_for_tpus(fsdp=-1), describe("gpu:h100x8"), plan_only=True)


@pytest.mark.slow
def test_gpus():
    from tests.aot import cuda_target

    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    cuda_target.needs_cudnn()
    cuda_target.h100_mesh(data=1)
    found = report(config_for_tpus(fsdp=-1), describe("gpu:h100x8"))
    assert found.fits
    assert found.kernels == "attention cudnn, cross_entropy triton, selective_scan triton"
    assert sum(each.received for each in found.traffic.values()) > 0
