import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.config import ModelConfig
from flowhn_jax.split import attention_branch_flops, ssm_branch_flops
from flowhn_jax.split.cost import balanced_tokens

PAPER_135M = ModelConfig().dims


def compiled_flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_projections_agree_with_xla():
    """Both branches' matrix products, written out, cost what XLA counts."""
    dims, tokens = PAPER_135M, 32
    width, kv = dims.width, dims.kv_heads * dims.head_dim
    shapes = [(width, width), (width, kv), (width, kv), (width, width)]
    projections = sum(
        compiled_flops(jnp.matmul, (tokens, rows), (rows, columns)) for rows, columns in shapes
    )
    scores = 4 * width * tokens * tokens
    mlp = 3 * compiled_flops(jnp.matmul, (tokens, width), (width, dims.mlp_width))
    expected = projections + scores + mlp
    assert attention_branch_flops(dims, tokens, causal=False) == expected

    inner = dims.inner
    shapes = [(width, 2 * inner), (inner, dims.dt_rank + 2 * dims.state), (dims.dt_rank, inner)]
    shapes += [(inner, width)]
    products = sum(
        compiled_flops(jnp.matmul, (tokens, rows), (rows, columns)) for rows, columns in shapes
    )
    elementwise = tokens * inner * (9 * dims.state + 2 + 2 * dims.conv)
    assert ssm_branch_flops(dims, tokens) == products + mlp + elementwise


def test_mamba2_projections_agree_with_xla():
    config = ModelConfig(ssm="mamba2", ssm_state=128, ssm_groups=2)
    dims, tokens = config.dims, 32
    width, inner, shared = dims.width, dims.inner, 2 * 2 * 128
    shapes = [(width, 2 * inner + shared + dims.ssm_heads), (inner, width)]
    shapes += 3 * [(width, dims.mlp_width)]
    products = sum(
        compiled_flops(jnp.matmul, (tokens, rows), (rows, columns)) for rows, columns in shapes
    )
    conv, scan = 2 * dims.conv * (inner + shared), inner * (5 * dims.state + 2)
    assert ssm_branch_flops(dims, tokens) == products + tokens * (conv + scan)


def test_causal_counts_each_pair_once():
    dims = dataclasses.replace(PAPER_135M, mlp_width=0)
    per_token = attention_branch_flops(dims, 1) - 4 * dims.width
    pairs = sum(1 for query in range(37) for key in range(37) if key <= query)
    expected = 37 * per_token + 4 * dims.width * pairs
    assert attention_branch_flops(dims, 37) == expected


def test_paper_dimensions_balance_within_two_per_cent():
    tokens = balanced_tokens(PAPER_135M, 1024)
    attention = attention_branch_flops(PAPER_135M, tokens)
    ssm = ssm_branch_flops(PAPER_135M, 1024 - tokens)
    assert abs(attention - ssm) / max(attention, ssm) < 0.02


@given(
    length=st.integers(1, 300),
    heads=st.sampled_from([1, 2, 4]),
    head_dim=st.integers(1, 64),
    inner=st.integers(1, 400),
    mlp_width=st.integers(0, 400),
)
def test_balance_is_the_best_of_all_shares(length, heads, head_dim, inner, mlp_width):
    dims = dataclasses.replace(
        PAPER_135M,
        width=heads * head_dim,
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        inner=inner,
        mlp_width=mlp_width,
    )

    def gap(tokens):
        return abs(attention_branch_flops(dims, tokens) - ssm_branch_flops(dims, length - tokens))

    assert gap(balanced_tokens(dims, length)) == min(map(gap, range(length + 1)))


@pytest.mark.parametrize("length", [1024, 2048, 8192, 32768, 131072])
def test_attention_share_falls_with_length(length):
    share = balanced_tokens(PAPER_135M, length) / length
    assert 0 < balanced_tokens(PAPER_135M, 2 * length) / (2 * length) < share < 1
