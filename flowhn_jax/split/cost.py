"""FLOPs of one branch on a number of tokens, and the share that makes the branches equal.

A multiply and an add are two FLOPs. Matrix products are counted exactly. The selective scan of
Mamba-1 is counted as 9 per channel and state plus 2 per channel (the convention of its authors and
of VMamba), Mamba-2's as 5 and 2: the recurrence, in which a head has one decay, whatever the form
in matrix products takes. The depthwise convolution is 2 per tap. Norms, activations and softmax
are not counted.
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
    dt_rank: int  # 0 in Mamba-2
    ssm_heads: int = 0  # of Mamba-2, each with one decay; 0: Mamba-1
    ssm_groups: int = 0  # of Mamba-2's heads, which share B and C


def score_flops(
    q_width: int, tokens: int, *, causal: bool = True, window: int | None = None, prefix: int = 0
) -> int:
    """FLOPs of attention's scores and of their product with the values, over all query heads.

    Args:
      q_width: query heads times their size.
      tokens: of the sequence, with its prefix.
      causal: whether pairs at or before the query alone are counted, not all tokens².
      window: positions that a token sees, its own included, besides the prefix; None: all.
      prefix: leading positions that all later ones see, too.
    """
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    if causal and window is not None:  # of query i all i - window + 1 - prefix between are unseen
        unseen = max(0, tokens - window - prefix)
        pairs -= unseen * (unseen + 1) // 2
    return 4 * q_width * pairs


def scan_flops(inner: int, state: int) -> int:
    """FLOPs of Mamba-1's scan, a token."""
    return 9 * inner * state + 2 * inner


def ssd_flops(inner: int, state: int) -> int:
    """FLOPs of Mamba-2's scan, a token."""
    return 5 * inner * state + 2 * inner


def conv_flops(channels: int, taps: int) -> int:
    """FLOPs of a depthwise convolution, a token."""
    return 2 * taps * channels


def _mlp_flops(dims: BranchDims) -> int:
    return 6 * dims.width * dims.mlp_width  # gate, up and down projections


def attention_branch_flops(dims: BranchDims, tokens: int, *, causal: bool = True) -> int:
    """Forward FLOPs of the attention branch over `tokens` tokens of one sequence.

    With `causal` only the scores at or before the query are counted, t (t + 1) / 2 pairs; without
    it all t² pairs, as in PaLM's MFU (arXiv 2204.02311, appendix B).
    """
    q_width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    projections = 2 * dims.width * (2 * q_width + 2 * kv_width)
    return tokens * (projections + _mlp_flops(dims)) + score_flops(q_width, tokens, causal=causal)


def ssm_branch_flops(dims: BranchDims, tokens: int) -> int:
    """Forward FLOPs of the SSM branch (Mamba mixer and MLP) over `tokens` tokens."""
    inner, state, rank = dims.inner, dims.state, dims.dt_rank
    in_and_out = 2 * dims.width * 3 * inner
    if dims.ssm_heads:
        shared = 2 * dims.ssm_groups * state  # B and C
        projections = in_and_out + 2 * dims.width * (shared + dims.ssm_heads)
        conv_and_scan = conv_flops(inner + shared, dims.conv) + ssd_flops(inner, state)
    else:
        projections = in_and_out + 2 * inner * (rank + 2 * state) + 2 * rank * inner
        conv_and_scan = conv_flops(inner, dims.conv) + scan_flops(inner, state)
    return tokens * (projections + conv_and_scan + _mlp_flops(dims))


def balanced_tokens(dims: BranchDims, length: int) -> int:
    """Attention's tokens a, in 0..length, for which F_attention(a) is nearest F_ssm(length - a)."""

    def excess(tokens: int) -> int:
        return attention_branch_flops(dims, tokens) - ssm_branch_flops(dims, length - tokens)

    low, high = 0, length  # excess rises with tokens, from at most 0 to at least 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return min((low, high), key=lambda tokens: abs(excess(tokens)))
