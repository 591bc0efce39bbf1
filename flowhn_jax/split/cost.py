"""FLOPs of one branch on a number of tokens, and the share that makes the branches equal.

A multiply and an add are two FLOPs. Matrix products are counted exactly. The selective scan is
counted as 9 per channel and state plus 2 per channel (the convention of the Mamba authors and of
VMamba), the depthwise convolution as 2 per tap. Norms, activations and softmax are not counted.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BranchDims:
    """Static sizes of the two branches of a block."""

    width: int  # D
    mlp_width: int  # hidden size of the branch MLPs; 0 where the branches have none
    heads: int  # query heads
    kv_heads: int
    head_dim: int  # K
    inner: int  # E, channels of the SSM mixer
    state: int  # S
    conv: int  # taps of the causal convolution
    dt_rank: int


def _mlp_flops(dims: BranchDims) -> int:
    return 6 * dims.width * dims.mlp_width  # gate, up and down projections


def attention_branch_flops(dims: BranchDims, tokens: int, *, causal: bool = True) -> int:
    """Forward FLOPs of the attention branch over `tokens` tokens of one sequence.

    With `causal` only the scores at or before the query are counted, t (t + 1) / 2 pairs; without
    it all t² pairs, as in PaLM's MFU (arXiv 2204.02311, appendix B).
    """
    q_width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    projections = 2 * dims.width * (2 * q_width + 2 * kv_width)
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    return tokens * (projections + _mlp_flops(dims)) + 4 * q_width * pairs


def ssm_branch_flops(dims: BranchDims, tokens: int) -> int:
    """Forward FLOPs of the SSM branch (Mamba-1 mixer and MLP) over `tokens` tokens."""
    inner, state, rank = dims.inner, dims.state, dims.dt_rank
    projections = 2 * (
        dims.width * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * dims.width
    )
    scan = 9 * inner * state + 2 * inner
    return tokens * (projections + 2 * dims.conv * inner + scan + _mlp_flops(dims))


def balanced_tokens(dims: BranchDims, length: int) -> int:
    """Attention's tokens a, in 0..length, for which F_attention(a) is nearest F_ssm(length - a)."""

    def excess(tokens: int) -> int:
        return attention_branch_flops(dims, tokens) - ssm_branch_flops(dims, length - tokens)

    low, high = 0, length  # excess rises with tokens, from at most 0 to at least 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return min((low, high), key=lambda tokens: abs(excess(tokens)))
