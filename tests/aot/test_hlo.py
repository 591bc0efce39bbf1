"""Parsing of a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from flowhn_jax.aot.hlo import Program, size, split

# As XLA writes it for a TPU: a loop whose counter goes from 1 in steps of 2, layouts with
# parentheses, comments in tuples, and an attribute of two lines.
TEXT = """HloModule jit_f, is_scheduled=true

%inner (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  ROOT %neg = f32[8]{0:T(128)S(1)} negate(%p.1)
}, execution_thread="sparsecore"

%body (p.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = s32[]{:T(128)} constant(2)
  %p.2 = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p.2), index=1
  %fused = f32[8]{0:T(128)} fusion(%x), kind=kLoop, calls=%inner, frontend_attributes={metadata={
"block": "{\\"q\\": 640}"
}}, metadata={op_name="jit(f)/jvp()/neg"}
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %out = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %fused)
}

%condition (p.3: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %p.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %one = s32[]{:T(128)} constant(1)
  %a = f32[8]{0:T(128)} parameter(0)
  %init = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%one, %a)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_program_of_a_tpu():
    program = Program(TEXT)
    assert program.entry == "main"
    assert dict(program.runs()) == {"main": 1, "body": 4, "inner": 4}
    fused = program.computations["body"]["fused"]
    assert (fused.opcode, fused.operands) == ("fusion", ("x",))
    assert 'op_name="jit(f)/jvp()/neg"' in fused.attributes


def test_abbreviated_elements_of_tuples():
    """Later versions of XLA write them so."""
    short = TEXT.replace("%i = s32[]{:T(128)} get-tuple-element(%p.2), index=0\n", "")
    short = short.replace("add(%i, ", "add(%p.2#0, ")
    short = short.replace("%j = s32[]{:T(128)} get-tuple-element(%p.3), index=0\n", "")
    short = short.replace("compare(%j, ", "compare(%p.3#0, ")
    program = Program(short)
    assert dict(program.runs()) == dict(Program(TEXT).runs())
    element = program.computations["body"]["p.2#0"]
    assert element == ("p.2#0", "s32[]{:T(128)}", "get-tuple-element", ("p.2",), "index=0")


def test_loops_within_loops_as_xla_counts_them():
    def f(x):
        def outer(_, x):
            return lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ x), x)

        return lax.fori_loop(0, 5, outer, x)

    program = Program(jax.jit(f).lower(jnp.ones((32, 32))).compile().as_text())
    assert {3 * 5, 5, 1} <= set(program.runs().values())


def test_a_loop_that_only_repeats_a_result_that_is_not_exact_counts_once():
    def f(x):
        def again(state):
            x, is_first = state
            return x @ x, is_first & jnp.isnan(x).any()

        return lax.while_loop(lambda state: state[1], again, (x, True))[0]

    program = Program(jax.jit(f).lower(jnp.ones((32, 32))).compile().as_text())
    assert set(program.runs().values()) == {1}


def test_a_loop_without_a_counter_is_rejected():
    program = Program(TEXT.replace("constant(8)", "parameter(1)"))
    with pytest.raises(ValueError, match="has no counter with a constant limit"):
        program.runs()


@pytest.mark.parametrize(
    ("result", "everywhere", "in_main_memory"),
    [
        ("f32[]", 4, 4),
        ("bf16[8,16]{1,0:T(8,128)(2,1)}", 256, 256),
        ("(s32[4]{0:T(128)}, pred[3]{0:T(128)S(1)}, u32[]{:S(2)})", 23, 16),
    ],
)
def test_sizes(result, everywhere, in_main_memory):
    assert size(result) == everywhere
    assert size(result, main_memory_only=True) == in_main_memory


def test_split():
    assert split("f32[2,3]{1,0:T(8,128)}, (s32[], f32[2]), %a") == [
        "f32[2,3]{1,0:T(8,128)}",
        " (s32[], f32[2])",
        " %a",
    ]
