"""Memory of a step per device, by kind."""

import dataclasses

import pytest

from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.step_memory import activations, memory
from flowhn_jax.checkpoints.state import abstract_state
from flowhn_jax.config import MeshConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.training.step import abstract_batch, lower_train_step
from tests.small import small_config

# A small program whose buffers are known: two forward results live to the backward pass.
TEXT = """HloModule f, is_scheduled=true

ENTRY %main (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %a = f32[10]{0} negate(%p), metadata={op_name="jit(f)/jvp(x)/neg"}
  %b = f32[20]{0} concatenate(%a, %a), metadata={op_name="jit(f)/jvp(x)/concatenate"}
  %c.1 = f32[5]{0:S(1)} slice(%b), metadata={op_name="jit(f)/jvp(x)/slice"}
  %c = f32[5]{0} copy(%c.1)
  %d = (f32[30]{0}, f32[40]{0:S(1)}) custom-call(%c), metadata={op_name="transpose(jvp(x))/d"}
  %e = f32[30]{0} get-tuple-element(%d), index=0
  %f = f32[30]{0} bitcast(%e)
  %g = f32[40]{0:S(1)} get-tuple-element(%d), index=1
  ROOT %h = f32[10]{0} custom-call(%a, %f, %g), metadata={op_name="jit(f)/transpose(jvp(x))/h"}
}
"""


def test_forward_results_at_the_peak():
    """The peak is at d: a, c and d's part in main memory; a and c are of the forward pass."""
    assert activations(Program(TEXT)) == 4 * (10 + 5)


@pytest.fixture(scope="module")
def steps():
    """Return the memory of a step over eight devices and XLA's sizes, by `remat`."""
    model = {"context": 64, "width": 32, "mlp_width": 64, "vocab_size": 64}
    config = small_config(model=model, train={"batch_size": 64})
    found = {}
    for remat in ("none", "full"):
        train = dataclasses.replace(config.train, remat=remat)
        each = dataclasses.replace(config, train=train)
        mesh = make_mesh(MeshConfig(data=2, fsdp=4), 64)
        compiled = lower_train_step(each, mesh).compile()
        sizes = compiled.memory_analysis()
        data = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        arguments = abstract_state(each, mesh), abstract_batch(each, mesh)
        found[remat] = memory(Program(compiled.as_text()), *arguments, data, code=5), sizes
    return found


@pytest.mark.slow
def test_kinds_add_up_to_xlas_sizes(steps):
    by_kind, sizes = steps["none"]
    assert by_kind.optimizer == pytest.approx(2 * by_kind.parameters, abs=16)
    assert by_kind.batch == 2 * 8 * 65 * 4  # tokens and documents
    state = by_kind.parameters + by_kind.optimizer + by_kind.batch
    assert state == pytest.approx(sizes.argument_size_in_bytes, rel=0.02)
    assert by_kind.activations + by_kind.temporaries == pytest.approx(
        sizes.temp_size_in_bytes, rel=0.02
    )
    assert by_kind.total == sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + 5


@pytest.mark.slow
def test_rematerialization_stores_fewer_activations(steps):
    without, full = (steps[remat][0].activations for remat in ("none", "full"))
    block_inputs = 3 * 8 * 64 * 32 * 4
    assert without > 3 * full
    assert full > block_inputs / 2
