"""FLOPs of one branch on a number of tokens, and the share that makes both branches equal.

A multiply and an add are two FLOPs. Matrix products are counted exactly. The selective scan of
Mamba-1 counts 9 FLOPs per channel and state plus 2 per channel (the convention of its authors and
of VMamba). Mamba-2's counts 5 and 2: those of the recurrence, in which a head has one decay, and
not those of its form in matrix products. The depthwise convolution counts 2 per tap. Norms,
activations and softmax are not counted.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BranchDims:
    """Sizes of the two branches of a block."""

    width: int  # D
    mlp_width: int  # hidden size of the branch MLPs; 0 where the branches have none
    heads: int  # query heads
    kv_heads: int
    head_dim: int  # K
    inner: int  # E, channels of the SSM mixer
    state: int  # S
    conv: int  # taps of the causal convolution
    dt_rank: int  # 0 in Mamba-2
    ssm_heads: int = 0  # heads of Mamba-2, each with one decay; 0: Mamba-1
    ssm_groups: int = 0  # groups of Mamba-2's heads, each of which shares B and C
    attention_mlp_width: int | None = None  # of the attention branch's MLP; None: mlp_width


def score_flops(
    q_width: int, tokens: int, *, causal: bool = True, window: int | None = None, prefix: int = 0
) -> int:
    """Return FLOPs of attention's scores and of their product with the values, over all heads.

    Args:
      q_width: number of query heads times their size.
      tokens: number of tokens in the sequence, prefix included.
      causal: whether to count only pairs with the key at or before the query, not all tokens².
      window: number of positions that a token sees besides the prefix, its own included; None: all.
      prefix: number of leading positions that all later ones see regardless of the window.
    """
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    if causal and window is not None:  # query i does not see i - window + 1 - prefix keys
        unseen = max(0, tokens - window - prefix)
        pairs -= unseen * (unseen + 1) // 2
    return 4 * q_width * pairs


def scan_flops(inner: int, state: int) -> int:
    """Return FLOPs of Mamba-1's scan per token."""
    return 9 * inner * state + 2 * inner


def ssd_flops(inner: int, state: int) -> int:
    """Return FLOPs of Mamba-2's scan per token."""
    return 5 * inner * state + 2 * inner


def conv_flops(channels: int, taps: int) -> int:
    """Return FLOPs of a depthwise convolution per token."""
    return 2 * taps * channels


def _mlp_flops(width: int, mlp_width: int) -> int:
    """Return FLOPs of the gate, up and down projections per token."""
    return 6 * width * mlp_width


def attention_branch_flops(
    dims: BranchDims, tokens: int, *, read: int | None = None, causal: bool = True
) -> int:
    """Return forward FLOPs of the attention branch (attention and MLP) on `tokens` tokens.

    With `causal` only the t (t + 1) / 2 scores with the key at or before the query count; without
    it all t² count, as in PaLM's MFU (arXiv 2204.02311, appendix B). With `read`, keys and values
    are those of `read` tokens, and the branch's own tokens are assumed evenly spread among them.
    """
    q_width, kv_width = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    read = tokens if read is None else read
    own_width = dims.attention_mlp_width
    mlp = _mlp_flops(dims.width, dims.mlp_width if own_width is None else own_width)
    products = tokens * (4 * dims.width * q_width + mlp) + read * 4 * dims.width * kv_width
    return products + score_flops(q_width, read, causal=causal) * tokens // max(1, read)


def ssm_branch_flops(dims: BranchDims, tokens: int, *, read: int | None = None) -> int:
    """Return forward FLOPs of the SSM branch (Mamba mixer and MLP) on `tokens` tokens.

    If `read` tokens enter the scan, only the branch's own ones have gates, outputs and the MLP.
    """
    read = tokens if read is None else read
    inner, state, rank = dims.inner, dims.state, dims.dt_rank
    one_projection = 2 * dims.width * inner  # of the inputs, the gates or the outputs
    if dims.ssm_heads:
        shared = 2 * dims.ssm_groups * state  # B and C
        projections = one_projection + 2 * dims.width * (shared + dims.ssm_heads)
        conv_and_scan = conv_flops(inner + shared, dims.conv) + ssd_flops(inner, state)
    else:
        projections = one_projection + 2 * inner * (rank + 2 * state) + 2 * rank * inner
        conv_and_scan = conv_flops(inner, dims.conv) + scan_flops(inner, state)
    mlp = _mlp_flops(dims.width, dims.mlp_width)
    return read * (projections + conv_and_scan) + tokens * (2 * one_projection + mlp)


def balanced_tokens(dims: BranchDims, length: int, *, reads_all: bool = False) -> int:
    """Return the a in 0..length that brings F_attention(a) nearest to F_ssm(length - a).

    With `reads_all` both branches read all tokens.
    """
    read = length if reads_all else None

    def excess(tokens: int) -> int:
        attention = attention_branch_flops(dims, tokens, read=read)
        return attention - ssm_branch_flops(dims, length - tokens, read=read)

    low, high = 0, length  # excess rises with tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return min((low, high), key=lambda tokens: abs(excess(tokens)))
