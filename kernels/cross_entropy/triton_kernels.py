"""The Triton kernel of head and cross-entropy. Imported only where Triton is installed.

A program computes a tile of logits in registers and writes of it what the loss and the gradients
need: the exponentials, if they are kept, and three numbers per token.
"""

# Without Triton, pyright takes the file triton.py next to this one for it.
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def exponentials(
    hidden_ptr,
    head_ptr,
    targets_ptr,
    shift_ptr,
    exps_ptr,
    total_ptr,
    target_ptr,
    peak_ptr,
    N: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Store exp(hidden @ head - shift) [N, V] in hidden's dtype, and statistics of the rows.

    hidden is [N, D], head [D, V], targets [N] int32, shift [N] float32. Of each tile of WORDS
    words, total, target and peak [tiles, N] float32 hold the sum of the exponentials, the target's
    logit minus the shift (0 if it is in another tile) and the largest logit.
    """
    token_tiles: tl.constexpr = (N + TOKENS - 1) // TOKENS
    # Programs that run at the same time read the same columns of the head, and all of hidden, which
    # the L2 cache keeps.
    n = (tl.program_id(0) % token_tiles) * TOKENS + tl.arange(0, TOKENS)
    tile = tl.program_id(0) // token_tiles
    v = tile * WORDS + tl.arange(0, WORDS)
    is_token, is_word = n < N, v < V
    row = n.to(tl.int64)[:, None]

    logits = tl.zeros([TOKENS, WORDS], tl.float32)
    for first in range(0, D, FEATURES):
        d = first + tl.arange(0, FEATURES)
        is_feature = d < D
        hidden = tl.load(hidden_ptr + row * D + d[None, :], is_token[:, None] & is_feature, 0.0)
        column = d.to(tl.int64)[:, None] * V + v[None, :]
        head = tl.load(head_ptr + column, is_feature[:, None] & is_word, 0.0)
        logits = tl.dot(hidden, head, logits)

    # In this order, so that each result takes the registers of the one before.
    shift = tl.load(shift_ptr + n, is_token, 0.0)
    target = tl.load(targets_ptr + n, is_token, -1)
    at = tile * N + n
    if V % WORDS:
        logits = tl.where(is_word[None, :], logits, -float("inf"))
    tl.store(peak_ptr + at, tl.max(logits, 1), is_token)
    centred = logits - shift[:, None]
    # A target past the last word is another device's.
    is_target = v[None, :] == tl.where(target < V, target, -1)[:, None]
    tl.store(target_ptr + at, tl.sum(tl.where(is_target, centred, 0.0), 1), is_token)
    exps = tl.exp(centred)
    tl.store(total_ptr + at, tl.sum(exps, 1), is_token)
    if KEEP:
        place = row * V + v[None, :]
        tl.store(exps_ptr + place, exps.to(exps_ptr.dtype.element_ty), is_token[:, None] & is_word)
