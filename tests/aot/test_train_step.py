"""The whole train step with its kernels, compiled for a TPU and for an H100."""

import math

import pytest

from flowhn_jax import config as config_lib
from flowhn_jax import recipes
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import lower_train_step
from kernels import backends
from tests.aot import cuda_target, tpu_target
from tests.small import small_config

pytestmark = pytest.mark.aot

GIB = 2**30


def compile_and_record(mesh, config):
    """Return the compiled step and its backends by operation."""
    with backends.record() as chosen:
        return lower_train_step(config, mesh).compile(), chosen


def paper_135m(sequences):
    recipe = recipes.load("flowhn_135m")
    recipe.train.batch_size = sequences
    return config_lib.parse(recipe)


def mesh_of(target, **axes):
    axes = {"data": 1} | axes
    count = math.prod(axes.values())
    if target == "v5e":
        devices = tpu_target.devices("v5e:2x2")[:count]
    else:
        pytest.importorskip("jax_triton", reason="compiles by jax-triton")
        cuda_target.needs_cudnn()
        devices = list(cuda_target.h100_mesh(data=count).devices.flat)
    return make_mesh(MeshConfig(**axes), 8, devices)


KERNELS = {
    "v5e": {
        "selective_scan": {"pallas_tpu"},
        "attention": {"splash"},
        "cross_entropy": {"xla"},
    },
    "h100": {
        "selective_scan": {"triton"},
        "attention": {"cudnn"},
        "cross_entropy": {"triton"},
    },
}


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(dict(data=4), marks=pytest.mark.slow),
        dict(fsdp=2, tensor=2),
        pytest.param(dict(fsdp=2, branch=2), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_a_small_step_over_four_devices(target, axes):
    """Kernels that XLA cannot partition over devices work under plain jit."""
    model = {"dtype": "auto", "context": 128, "width": 128, "mlp_width": 256, "blocks": 1}
    model["vocab_size"] = 512
    if target == "v5e":
        model["heads"] = 2
    else:
        model["heads"], model["kv_heads"] = 8, 2
    mesh = mesh_of(target, **axes)
    _, chosen = compile_and_record(mesh, small_config("fai_split", model=model))
    assert chosen == KERNELS[target]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "gib"), [("v5e", 2.0), ("h100", 2.0)])
def test_the_papers_135m_on_one_device(target, gib):
    """8 x 1024 tokens: temporary memory is bounded."""
    compiled, chosen = compile_and_record(mesh_of(target), paper_135m(8))
    assert chosen == KERNELS[target]
    memory = compiled.memory_analysis().temp_size_in_bytes
    print("temporary memory in GiB", memory / GIB)
    assert memory < gib * GIB
