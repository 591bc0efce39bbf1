"""What `train.remat` runs again in the backward pass, and what it stores, for absent hardware."""

import collections
import dataclasses

import jax
import pytest

from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import abstract_batch, make_train_step
from tests.aot import cuda_target, tpu_target
from tests.jaxprs import jaxprs
from tests.small import small_config

pytestmark = pytest.mark.aot

# One block with attention and a scan, each a kernel with a forward and a backward pass.
_MODEL = {"dtype": "auto", "context": 128, "width": 128, "mlp_width": 256, "blocks": 1}
_MODEL |= {"vocab_size": 512, "heads": 8, "kv_heads": 2}
_KERNELS = ("pallas_call", "triton_kernel_call", "dot_product_attention_fwd")


def kernel_calls(jaxpr):
    """Return how often a jaxpr uses the results of each kernel, by the kernel's name.

    JAX leaves calls without used results in a jaxpr; XLA removes them.
    """
    counts = collections.Counter()
    for each in jaxprs(jaxpr, opaque=_KERNELS):
        used = {id(x) for x in (*each.outvars, *(x for other in each.eqns for x in other.invars))}
        for equation in each.eqns:
            name = equation.primitive.name
            if name.startswith(_KERNELS) and any(id(x) in used for x in equation.outvars):
                counts[str(equation.params.get("name", name))] += 1
    return counts


def calls_in_step(remat, devices, **axes):
    config = small_config(model=_MODEL, train={"remat": remat, "batch_size": len(devices)})
    config = dataclasses.replace(config, mesh=MeshConfig(**{"data": 1} | axes))
    mesh = make_mesh(config.mesh, 0, devices)
    arguments = abstract_state(config, mesh), abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        return kernel_calls(make_train_step(config, mesh).trace(*arguments).jaxpr)


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 2, "tensor": 2}])
def test_kernels_of_a_tpu_run_forward_once_unless_everything_is_recomputed(axes):
    devices = tpu_target.devices("v5e:2x2")
    none, dots, full = (calls_in_step(each, devices, **axes) for each in ("none", "dots", "full"))
    assert len(none) >= 4
    assert dots == none
    assert {name for name in full if full[name] == 2 * none[name]} == {
        name for name in none if "fwd" in name or "forward" in name
    }


def test_kernels_of_a_gpu_run_forward_once_unless_everything_is_recomputed():
    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    cuda_target.needs_cudnn()
    devices = list(cuda_target.h100_mesh(data=1).devices.flat)
    none, dots, full = (calls_in_step(each, devices, data=1) for each in ("none", "dots", "full"))
    assert len(none) >= 2
    assert dots == none
    assert full.total() > none.total()
