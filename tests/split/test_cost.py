import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowhn_jax.config import FlowHNConfig
from flowhn_jax.split import (
    BranchDims,
    SplitConfig,
    attention_branch_flops,
    ssm_branch_flops,
)
from flowhn_jax.split.cost import balanced_tokens, score_flops

PAPER_135M = FlowHNConfig().dims


def compiled_flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_projections_agree_with_xla():
    """Both branches' matrix products cost what XLA counts for them."""
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
    config = FlowHNConfig(ssm="mamba2", ssm_state=128, ssm_groups=2)
    dims, tokens = config.dims, 32
    width, inner, shared = dims.width, dims.inner, 2 * 2 * 128
    shapes = [(width, 2 * inner + shared + dims.ssm_heads), (inner, width)]
    shapes += 3 * [(width, dims.mlp_width)]
    products = sum(
        compiled_flops(jnp.matmul, (tokens, rows), (rows, columns)) for rows, columns in shapes
    )
    conv, scan = 2 * dims.conv * (inner + shared), inner * (5 * dims.state + 2)
    assert ssm_branch_flops(dims, tokens) == products + tokens * (conv + scan)


# No two sizes are equal, and the heads' width of 8 differs from the model's.
SMALL = BranchDims(
    width=6, mlp_width=5, heads=2, kv_heads=1, head_dim=4, inner=7, state=3, conv=4, dt_rank=2
)


def test_attention_by_hand():
    """Queries and output 6 x 8, keys and values 6 x 4, gate, up and down 6 x 5."""
    per_token = 2 * (48 + 48 + 24 + 24) + 2 * 3 * 30
    assert attention_branch_flops(SMALL, 3) == 3 * per_token + 2 * 2 * 8 * 6
    assert attention_branch_flops(SMALL, 3, causal=False) == 3 * per_token + 2 * 2 * 8 * 9


def test_an_mlp_of_attention_alone_by_hand():
    """Of 9 instead of 5 units: gate, up and down 6 x 4 more; the SSM's does not change."""
    wider = dataclasses.replace(SMALL, attention_mlp_width=9)
    more = 3 * 2 * 3 * 24
    assert attention_branch_flops(wider, 3) == attention_branch_flops(SMALL, 3) + more
    assert ssm_branch_flops(wider, 3) == ssm_branch_flops(SMALL, 3)


def test_branches_that_read_more_than_their_own_by_hand():
    """Three tokens of nine: of the others only keys and values, or inputs and the scan."""
    of_read = 2 * (24 + 24)
    of_own = 2 * (48 + 48) + 2 * 3 * 30
    assert attention_branch_flops(SMALL, 3, read=9) == 9 * of_read + 3 * of_own + 4 * 8 * 45 // 3
    of_read = 2 * (42 + 56 + 14) + 2 * 4 * 7 + 9 * 21 + 2 * 7
    of_own = 2 * (42 + 42) + 2 * 3 * 30
    assert ssm_branch_flops(SMALL, 3, read=9) == 9 * of_read + 3 * of_own
    for flops in (attention_branch_flops, ssm_branch_flops):
        assert flops(SMALL, 3, read=3) == flops(SMALL, 3)


@pytest.mark.parametrize("strategy", ["fa_split", "fac_split", "fai_split"])
def test_a_wider_attention_gets_fewer_tokens(strategy):
    """At the paper's sizes, with an MLP of five times the width, a quarter instead of 576."""
    config = FlowHNConfig(split=SplitConfig(strategy), attention_mlp_width=10240)
    for block in config.plan().blocks:
        tokens = block.attention.count(1024)
        flops = attention_branch_flops(config.dims, tokens)
        others = ssm_branch_flops(config.dims, 1024 - tokens)
        assert tokens == 256
        assert abs(flops - others) / max(flops, others) < 0.02


def test_mamba1_by_hand():
    """In 6 x 14, out 7 x 6, x 7 x (2 + 3 + 3), dt 2 x 7; 4 taps; 7 x 3 states; the MLP."""
    per_token = 2 * (84 + 42 + 56 + 14) + 2 * 4 * 7 + 9 * 21 + 2 * 7 + 2 * 3 * 30
    assert ssm_branch_flops(SMALL, 3) == 3 * per_token


def test_mamba2_by_hand():
    """In 6 x (2 * 7 + 2 * 2 * 3 + 7), out 7 x 6; 4 taps on 7 + 12 channels; 7 x 3 states."""
    dims = dataclasses.replace(SMALL, dt_rank=0, ssm_heads=7, ssm_groups=2)
    per_token = 2 * (6 * 33 + 42) + 2 * 4 * 19 + 5 * 21 + 2 * 7 + 2 * 3 * 30
    assert ssm_branch_flops(dims, 3) == 3 * per_token


@pytest.mark.parametrize("window", [None, 1, 5, 9, 10])
@pytest.mark.parametrize("prefix", [0, 3, 8])
def test_causal_scores_count_each_pair_once(window, prefix):
    seen = sum(
        window is None or key > query - window or key < prefix
        for query in range(9)
        for key in range(query + 1)
    )
    assert score_flops(8, 9, window=window, prefix=prefix) == 2 * 2 * 8 * seen
    assert score_flops(8, 9, causal=False, window=window, prefix=prefix) == 2 * 2 * 8 * 81
    if not prefix:
        assert score_flops(8, 9, window=window) == 2 * 2 * 8 * seen


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
    attention_mlp_width=st.none() | st.integers(1, 2000),
    reads_all=st.booleans(),
)
def test_balance_is_the_best_of_all_shares(
    length, heads, head_dim, inner, mlp_width, attention_mlp_width, reads_all
):
    dims = dataclasses.replace(
        PAPER_135M,
        width=heads * head_dim,
        heads=heads,
        kv_heads=1,
        head_dim=head_dim,
        inner=inner,
        mlp_width=mlp_width,
        attention_mlp_width=attention_mlp_width,
    )

    read = length if reads_all else None

    def gap(tokens):
        attention = attention_branch_flops(dims, tokens, read=read)
        return abs(attention - ssm_branch_flops(dims, length - tokens, read=read))

    found = balanced_tokens(dims, length, reads_all=reads_all)
    assert gap(found) == min(map(gap, range(length + 1)))


def test_one_token_goes_to_the_cheaper_branch():
    """Attention takes 500 FLOPs; the SSM takes 831 or, with one channel, 273."""
    assert balanced_tokens(SMALL, 1) == 1
    assert balanced_tokens(dataclasses.replace(SMALL, inner=1), 1) == 0


@pytest.mark.parametrize("length", [1024, 2048, 8192, 32768, 131072])
def test_attention_share_falls_with_length(length):
    share = balanced_tokens(PAPER_135M, length) / length
    assert 0 < balanced_tokens(PAPER_135M, 2 * length) / (2 * length) < share < 1
