"""Work of single instructions, written by hand as XLA writes them."""

import pytest

from flowhn_jax.aot.hlo import Program
from flowhn_jax.aot.roofline.work import Workload

ROWS = "f32[64,128]{1,0:T(8,128)}"
ROWS_BYTES = 64 * 128 * 4


def work_of(entry, *others):
    """Return the work of the last instruction of a program's entry."""
    main = f"ENTRY %main () -> f32[] {{{entry}\n}}\n"
    program = Program("\n\n".join(["HloModule f, is_scheduled=true", *others, main]))
    instruction = next(reversed(program.computations["main"].values()))
    return Workload(program).of("main", instruction)


def test_a_library_call_of_a_batched_product():
    found = work_of("""
  %a = bf16[8,64,32]{2,1,0} parameter(0)
  %b = bf16[8,32,16]{2,1,0} parameter(1)
  ROOT %c = (bf16[8,64,16]{2,1,0}, s8[1024]{0}) custom-call(%a, %b),
    custom_call_target="__cublas$gemm", backend_config={"operation_queue_id":"0",
    "gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{
    "lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],
    "lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}""")
    assert found.flops == 2 * 8 * 64 * 32 * 16
    assert found.moved == 2 * 8 * (64 * 32 + 32 * 16 + 64 * 16) + 1024


@pytest.mark.parametrize(("end", "products"), [("", 2), ("Backward", 5)])
@pytest.mark.parametrize(("mask", "share"), [("CAUSAL", 2), ("NO_MASK", 1)])
def test_flash_attention_of_cudnn(end, products, mask, share):
    found = work_of(f"""
  %q = bf16[4,96,8,24]{{3,2,1,0}} parameter(0)
  ROOT %o = (bf16[4,8,96,24]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %q, %q),
    custom_call_target="__cudnn$fmhaSoftmax{end}", backend_config={{"cudnn_fmha_backend_config":{{
    "intermediate_tensor_shape":{{"dimensions":["4","8","96","96"]}},"mask_type":"{mask}"}}}}""")
    assert found.flops == products * 2 * 4 * 8 * 96 * 96 * 24 // share


def test_multiplications_with_padding_do_not_count():
    """A causal convolution of four taps as XLA writes it, over 16 positions."""
    found = work_of("""
  %x = f32[2,16,32]{2,1,0} parameter(0)
  %w = f32[4,32,64]{2,1,0} parameter(1)
  ROOT %y = f32[2,16,64]{2,1,0} convolution(%x, %w),
    window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f""")
    assert found.flops == 2 * 2 * 32 * 64 * (4 * 16 - 3 - 2 - 1)


def test_an_update_in_place_moves_the_update():
    fused = f"""%fused (a: f32[64,128], b: f32[1,128], i: s32[]) -> f32[64,128] {{
  %a = {ROWS} parameter(0)
  %b = f32[1,128]{{1,0:T(1,128)}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = {ROWS} dynamic-update-slice(%a, %b, %i, %i)
}}"""
    found = work_of(
        f"""
  %a = {ROWS} parameter(0)
  %b = f32[1,128]{{1,0:T(1,128)}} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = {ROWS} fusion(%a, %b, %i), kind=kLoop,
    output_to_operand_aliasing={{{{}}: (0, {{}})}}, calls=%fused""",
        fused,
    )
    assert found.moved == 2 * 128 * 4 + 4


def test_buffers_of_a_collective_pass_through_a_fusion():
    """The product's fusion in which a gather proceeds reads x and writes y."""
    fused = f"""%fused (s: f32[64,128], t: f32[64,128], x: f32[64,128]) -> f32[64,128] {{
  %s = {ROWS} parameter(0)
  %t = {ROWS} parameter(1)
  %x = {ROWS} parameter(2)
  %g = {ROWS} all-gather(%s), channel_id=1, frontend_attributes={{chain_id="1"}}
  %y = {ROWS} negate(%x)
  ROOT %all = ({ROWS}, {ROWS}, {ROWS}) tuple(%y, %s, %t)
}}"""
    found = work_of(
        f"""
  %s = {ROWS} parameter(0)
  %t = {ROWS} parameter(1)
  %x = {ROWS} parameter(2)
  ROOT %f = ({ROWS}, {ROWS}, {ROWS}) fusion(%s, %t, %x), kind=kOutput,
    output_to_operand_aliasing={{{{1}}: (0, {{}}), {{2}}: (1, {{}})}}, calls=%fused""",
        fused,
    )
    assert found.moved == 2 * ROWS_BYTES


def test_what_is_free():
    assert (
        work_of(f"""
  %a = {ROWS} parameter(0)
  ROOT %b = f32[8192]{{0:T(1024)}} bitcast(%a)""")
        is None
    )
    assert (
        work_of(f"""
  ROOT %a = {ROWS} custom-call(), custom_call_target="AllocateBuffer" """)
        is None
    )
