"""XLA's options of the train step, by device and mesh."""

import dataclasses

import pytest

from flowhn_jax.checkpoints.state import state_shardings
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import compiler_options
from tests.aot import tpu_target
from tests.small import small_config

OPTION = "xla_tpu_enable_windowed_einsum_for_all_gather"


def options_on(devices=None, **axes):
    config = dataclasses.replace(small_config(), mesh=MeshConfig(**axes))
    mesh = make_mesh(config.mesh, 0, devices)
    return compiler_options(mesh, state_shardings(config, mesh).params)


@pytest.mark.aot
@pytest.mark.parametrize("axes", [dict(data=1, fsdp=4), dict(data=2, tensor=2)])
def test_sharded_weights_of_tpus_are_gathered_before_their_products(axes):
    assert options_on(tpu_target.devices("v5e:2x2"), **axes) == {OPTION: False}


@pytest.mark.aot
def test_replicated_weights_of_tpus_need_no_option():
    assert options_on(tpu_target.devices("v5e:2x2"), data=4) is None


@pytest.mark.parametrize("axes", [dict(data=1, fsdp=-1), dict(data=8)])
def test_cpus_use_their_longest_vectors(axes):
    assert options_on(**axes) == {"xla_cpu_prefer_vector_width": 512}
