"""Attention by splash and cuDNN, compiled for TPUs and for an H100."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from flowhn_jax.aot.hlo import Program
from flowhn_jax.layers.attention import Attention, AttentionSizes
from flowhn_jax.layers.context import LayerContext
from kernels import backends
from kernels.attention import attention
from tests.aot import cuda_target, tpu_target

pytestmark = pytest.mark.aot

MIB = 2**20
PAPER_HEADS = [24, 32, 64]  # of 135M, 350M and 1B, each with 32 and 8 heads

every_generation = pytest.mark.parametrize("topology", tpu_target.GENERATIONS.values())


def compile_step(mesh, batch, length, heads, groups, size, *, documents, window=None):
    """Compile forward and backward in bfloat16, batch over `data`; return the backend as well."""

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, kv = array(batch, length, heads, size), array(batch, length, groups, size)
    arguments = [q, kv, kv, q]
    if documents:
        arguments.append(array(batch, length, dtype=jnp.int32))

    def step(q, k, v, dout, segment_ids=None):
        run = partial(attention, segment_ids=segment_ids, window=window)
        out, vjp = jax.vjp(run, q, k, v)
        return out, vjp(dout)

    with jax.set_mesh(mesh), backends.record() as chosen:
        shapes = tpu_target.on_mesh(mesh, arguments, [P("data")] * len(arguments))
        compiled = jax.jit(step).lower(*shapes).compile()
    return compiled, chosen["attention"]


@every_generation
def test_splash(topology):
    mesh = tpu_target.mesh(topology, data=len(tpu_target.devices(topology)))
    _, chosen = compile_step(mesh, 8, 577, 32, 8, 24, documents=True)
    assert chosen == {"splash"}


@pytest.mark.parametrize(
    ("topology", "heads", "groups", "size", "allowed"),
    [
        ("v5e:2x2", 32, 8, 24, 0),
        ("v5e:2x2", 12, 3, 64, 0),
        # dq, for the gradient of q_proj.
        pytest.param("v5p:2x2x1", 32, 8, 24, 1, marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 12, 3, 64, 0, marks=pytest.mark.slow),
    ],
)
def test_copies_of_a_layer_around_splash(topology, heads, groups, size, allowed):
    """Products write q, k and v as the kernels read them, and read their results likewise."""
    batch, length, width = 64, 577, 768
    mesh = tpu_target.mesh(topology, data=len(tpu_target.devices(topology)))
    context = LayerContext(nnx.Rngs(0), jnp.bfloat16, init_std=0.02, norm_eps=1e-5)
    sizes = AttentionSizes(width, heads, groups, size)
    graph, state = nnx.split(Attention(sizes, context))

    def step(state, x, segment_ids, dy):
        y, vjp = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, segment_ids), state, x)
        return y, vjp(dy)

    x = jax.ShapeDtypeStruct((batch, length, width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    arguments = state, x, ids, x
    specs = jax.tree.map(lambda _: P(), state), P("data"), P("data"), P("data")
    with jax.set_mesh(mesh), backends.record() as chosen:
        shapes = tpu_target.on_mesh(mesh, arguments, specs)
        compiled = jax.jit(step).lower(*shapes).compile()
    assert chosen["attention"] == {"splash"}
    keys = batch // mesh.size * groups * length * size
    assert len(copies(compiled.as_text(), size, keys)) == allowed


def copies(hlo, last, elements):
    """Return the instructions that only move large arrays, to main memory.

    Args:
      hlo: text of the compiled program.
      last: size of the arrays' last dimension.
      elements: minimum of an array.
    """
    program = Program(hlo)

    def moves(instruction):
        if instruction.opcode != "fusion":
            return instruction.opcode in ("copy", "transpose", "pad", "slice", "reshape")
        fused = program.computations[re.search(r"calls=%([\w.-]+)", instruction.attributes)[1]]
        return not any(x.opcode in ("convolution", "dot") for x in fused.values())

    def is_large(instruction):
        arrays = re.findall(r"\w+\[([\d,]+)\](\{[^}]*\})?", instruction.result)
        in_main_memory = [shape for shape, layout in arrays if "S(1)" not in layout]
        dimensions = [[int(n) for n in shape.split(",")] for shape in in_main_memory]
        return any(shape[-1] == last and math.prod(shape) >= elements for shape in dimensions)

    entry = program.computations[program.entry].values()
    return [x for x in entry if moves(x) and is_large(x)]


@pytest.mark.slow
@every_generation
@pytest.mark.parametrize("length", [440, 1025, 2048, 8192, 32768])
@pytest.mark.parametrize("size", [*PAPER_HEADS, 128, 256])
@pytest.mark.parametrize("documents", [False, True])
def test_splash_at_more_shapes(topology, length, size, documents):
    mesh = tpu_target.mesh(topology, data=len(tpu_target.devices(topology)))
    window = None if documents else 300
    _, chosen = compile_step(mesh, 8, length, 32, 8, size, documents=documents, window=window)
    assert chosen == {"splash"}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("length", "window"), [(2048, None), (577, None), (1025, 300)])
@pytest.mark.parametrize("size", PAPER_HEADS)
def test_cudnn(length, window, size, documents):
    """The scores are never materialized: at 2048 tokens they would take 4 GiB in float32."""
    cuda_target.needs_cudnn()
    mesh = cuda_target.h100_mesh(data=1)
    compiled, chosen = compile_step(
        mesh, 8, length, 32, 8, size, documents=documents, window=window
    )
    assert chosen == {"cudnn"}
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * MIB


def test_cudnn_over_a_mesh_stays_local():
    cuda_target.needs_cudnn()
    compiled, _ = compile_step(cuda_target.h100_mesh(data=4), 8, 577, 32, 8, 24, documents=True)
    text = compiled.as_text()
    assert "cudnn" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all"))
