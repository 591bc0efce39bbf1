"""Head and cross-entropy, compiled for TPUs and NVIDIA GPUs: which arrays they write."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import backends
from kernels.cross_entropy import cross_entropy
from kernels.cross_entropy import triton as triton_backend
from tests.aot import cuda_target, tpu_target
from tests.kernels.triton_checks import launches

pytestmark = pytest.mark.aot

MIB = 2**20
CHUNK, WIDTH, WORDS = 256, 384, 8192


def compiled(mesh, devices=1, reduction="sum"):
    """Return the compiled loss with gradients, two chunks of tokens per device, and its backend."""

    def on_mesh(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    tokens = devices, 2 * CHUNK
    arrays = (
        on_mesh((*tokens, WIDTH), jnp.bfloat16, "fsdp"),
        on_mesh((WIDTH, WORDS), jnp.float32, "fsdp"),
        on_mesh(tokens, jnp.int32, "fsdp"),
    )
    loss = partial(cross_entropy, reduction=reduction, chunk_size=CHUNK)

    def run(hidden, head, targets):
        result, vjp = jax.vjp(lambda *floats: loss(*floats, targets), hidden, head)
        return result, vjp(jnp.ones_like(result)) if reduction == "sum" else ()

    gradients = (arrays[0].sharding, arrays[1].sharding) if reduction == "sum" else ()
    results = NamedSharding(mesh, P() if reduction == "sum" else P("fsdp")), gradients
    with jax.set_mesh(mesh), backends.record() as chosen:
        program = jax.jit(run, out_shardings=results).lower(*arrays).compile()
    return program, chosen["cross_entropy"].pop()


def writes(program, array):
    """Return whether an operation outside of fusions writes the array, such as 'f32[8,16]'."""
    fused = re.findall(r"\n%?(?:fused|gemm)[\w.-]* \(.*?\n\}", program.as_text(), re.DOTALL)
    text = program.as_text()
    for computation in fused:
        text = text.replace(computation, "")
    return re.search(rf" = [^=]*{re.escape(array)}\S*[^=]*\w+\(", text) is not None


def test_a_tpu_writes_the_exponentials_once():
    """In bfloat16; the logits in float32 are never written."""
    program, backend = compiled(tpu_target.mesh("v5e:2x2", fsdp=4), 4)
    assert backend == "xla"
    assert writes(program, f"bf16[{CHUNK},{WORDS}]")
    assert not writes(program, f"f32[{CHUNK},{WORDS}]")


def test_over_a_slice_of_tpus_the_heads_gradient_is_scattered_while_it_is_summed():
    program, _ = compiled(tpu_target.mesh("v5e:2x2", fsdp=4), 4)
    text = program.as_text()
    assert not re.search(rf"f32\[{WIDTH},{WORDS}\]\S* all-reduce", text)
    assert len(re.findall(r" collective-permute-start\(", text)) == 2 * 3


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("devices", [1, 2])
def test_an_h100_writes_the_exponentials_once(devices, reduction):
    """With gradients in bfloat16; alone the loss writes neither logits nor exponentials."""
    pytest.importorskip("jax_triton", reason="compiles by jax-triton")
    program, backend = compiled(cuda_target.h100_mesh(fsdp=devices), devices, reduction)
    assert backend == "triton"
    assert writes(program, f"bf16[{CHUNK},{WORDS}]") == (reduction == "sum")
    assert not writes(program, f"f32[{CHUNK},{WORDS}]")
    assert not re.search(rf"bf16\[{CHUNK},{WORDS}\]\S* copy\(", program.as_text())


@pytest.mark.parametrize("capability", cuda_target.ARCHITECTURES)
@pytest.mark.parametrize("keep", [True, False])
def test_registers_do_not_spill(capability, keep):
    pytest.importorskip("triton", reason="compiles by Triton")
    from kernels.cross_entropy import triton_kernels

    hidden = jax.ShapeDtypeStruct((2048, 768), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((768, 65536), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((2048,), jnp.int32)
    shift = jax.ShapeDtypeStruct((2048,), jnp.float32)

    def exponentials(run, *arrays):
        return triton_backend.products(run).exponentials(*arrays, keep)

    (launch,) = launches(exponentials, hidden, head, targets, shift)
    assert launch.grid == (16 * 256,)
    needs = cuda_target.compile_kernel(triton_kernels.exponentials, launch, capability)
    print(capability, keep, needs)
    assert needs.spilled <= {80: 32, 90: 0}[capability]
