"""State-space duality as Triton kernels. Imported only where Triton is installed.

`states_forward` and `states_backward` walk over the chunks, in one program for each head of a
sequence and tile of states, with the states or their gradients in registers. Given those before and
after each chunk, the chunks are independent: `tokens_forward` and `tokens_backward` are run by one
program for each chunk and head, and `group_sums`, which adds up the gradients of B and C over the
heads of a group, by one for each chunk and tile of states.

Sizes: TOKENS of a chunk; CHANNELS of a head, P filled up to a power of two; STATES of a tile.
Vectors per head and token are [B, H, chunks * TOKENS], filled up with zeros at the end, where the
document stays the same. Row numbers have 64 bits. An array whose HAS_ flag is off is not read.
"""

# Triton's annotations do not know the operators of its tensors.
# pyright: reportGeneralTypeIssues=false
# Without Triton, pyright takes the file triton.py next to this one for it.
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl


@triton.jit
def states_forward(
    x_ptr,
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    document_ptr,
    initial_ptr,
    starts_ptr,
    last_ptr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store the states before each chunk and the last one.

    They are [B, H, chunks, P, S] in x's dtype and [B, H, P, S].
    """
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    group = head // (H // G)
    dtype = x_ptr.dtype.element_ty
    p, s = tl.arange(0, CHANNELS), tl.program_id(2) * STATES + tl.arange(0, STATES)
    of_state = p[:, None] * S + s[None, :]
    in_state = (p[:, None] < P) & (s[None, :] < S)
    h = tl.load(initial_ptr + (batch * H + head) * P * S + of_state, in_state, 0.0)
    for chunk in range(chunks):
        start = ((batch * H + head) * chunks + chunk) * P * S
        tl.store(starts_ptr + start + of_state, h.to(dtype), in_state)
        _, keep = _from_start(
            coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
        )
        delta, after = _to_end(
            delta_ptr, coarse_ptr, fine_ptr, document_ptr,
            batch, head, chunk, chunks, H, TOKENS, HAS_IDS,
        )  # fmt: skip
        x = _load(x_ptr, batch, head, chunk, p, L, H, P, TOKENS).to(tl.float32)
        B = _load(B_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        written = (x * (delta * after)[:, None]).to(dtype)
        h = keep * h + _dot(tl.trans(written), B)
    tl.store(last_ptr + (batch * H + head) * P * S + of_state, h, in_state)


@triton.jit
def tokens_forward(
    x_ptr,
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    document_ptr,
    starts_ptr,
    y_ptr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store y [B, L, H, P]."""
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    dtype = x_ptr.dtype.element_ty
    p = tl.arange(0, CHANNELS)
    states_at = ((batch * H + head) * chunks + chunk) * P * S
    scores = tl.zeros([TOKENS, TOKENS], tl.float32)  # [t, s]
    read = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for first in range(0, S, STATES):
        s = first + tl.arange(0, STATES)
        B = _load(B_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        C = _load(C_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        scores += _dot(C, tl.trans(B))
        read += _dot(C, tl.trans(_load_state(starts_ptr + states_at, p, s, P, S)))
    before, _ = _from_start(
        coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
    )
    weights = scores * _decays(
        coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
    )
    delta, _ = _to_end(
        delta_ptr, coarse_ptr, fine_ptr, document_ptr,
        batch, head, chunk, chunks, H, TOKENS, HAS_IDS,
    )  # fmt: skip
    x = _load(x_ptr, batch, head, chunk, p, L, H, P, TOKENS).to(tl.float32)
    y = _dot(weights.to(dtype), (x * delta[:, None]).to(dtype))
    y += before[:, None] * read + tl.load(D_ptr + head) * x
    _store(y_ptr, y, batch, head, chunk, p, L, H, P, TOKENS)


@triton.jit
def states_backward(
    x_ptr,
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    document_ptr,
    dy_ptr,
    dlast_ptr,
    dends_ptr,
    dinitial_ptr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store the gradients of the states after each chunk and of the initial state.

    They are [B, H, chunks, P, S] in x's dtype and [B, H, P, S].
    """
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    head = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    group = head // (H // G)
    dtype = x_ptr.dtype.element_ty
    p, s = tl.arange(0, CHANNELS), tl.program_id(2) * STATES + tl.arange(0, STATES)
    of_state = p[:, None] * S + s[None, :]
    in_state = (p[:, None] < P) & (s[None, :] < S)
    dh = tl.load(dlast_ptr + (batch * H + head) * P * S + of_state, in_state, 0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        end = ((batch * H + head) * chunks + chunk) * P * S
        tl.store(dends_ptr + end + of_state, dh.to(dtype), in_state)
        before, keep = _from_start(
            coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
        )
        dy = _load(dy_ptr, batch, head, chunk, p, L, H, P, TOKENS).to(tl.float32)
        C = _load(C_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        dh = keep * dh + _dot(tl.trans((dy * before[:, None]).to(dtype)), C)
    tl.store(dinitial_ptr + (batch * H + head) * P * S + of_state, dh, in_state)


@triton.jit
def tokens_backward(
    x_ptr,
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    document_ptr,
    starts_ptr,
    dy_ptr,
    dends_ptr,
    dx_ptr,
    ddelta_ptr,
    dexponents_ptr,
    dD_ptr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store the gradients of x and of what is per head and token, [B, H, chunks * TOKENS].

    `dexponents` are of the decays' natural logarithms; `dD` [B, H, chunks] are sums over a chunk.
    """
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    dtype = x_ptr.dtype.element_ty
    p = tl.arange(0, CHANNELS)
    states_at = ((batch * H + head) * chunks + chunk) * P * S
    scores = tl.zeros([TOKENS, TOKENS], tl.float32)  # [t, s]
    read = tl.zeros([TOKENS, CHANNELS], tl.float32)
    arrived = tl.zeros([TOKENS, CHANNELS], tl.float32)
    of_keep = 0.0
    for first in range(0, S, STATES):
        s = first + tl.arange(0, STATES)
        B = _load(B_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        C = _load(C_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
        h = _load_state(starts_ptr + states_at, p, s, P, S)
        dh = _load_state(dends_ptr + states_at, p, s, P, S)
        scores += _dot(C, tl.trans(B))
        read += _dot(C, tl.trans(h))
        arrived += _dot(B, tl.trans(dh))
        of_keep += tl.sum(dh.to(tl.float32) * h.to(tl.float32))
    before, keep = _from_start(
        coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
    )
    delta, after = _to_end(
        delta_ptr, coarse_ptr, fine_ptr, document_ptr,
        batch, head, chunk, chunks, H, TOKENS, HAS_IDS,
    )  # fmt: skip
    x = _load(x_ptr, batch, head, chunk, p, L, H, P, TOKENS).to(tl.float32)
    dy = _load(dy_ptr, batch, head, chunk, p, L, H, P, TOKENS)
    dy_f32 = dy.to(tl.float32)
    row = (batch * H + head) * chunks + chunk
    tl.store(dD_ptr + row, tl.sum(dy_f32 * x))
    of_before = before * tl.sum(read * dy_f32, 1)
    of_before += tl.where(tl.arange(0, TOKENS) == TOKENS - 1, keep * of_keep, 0.0)
    of_after = after * delta * tl.sum(arrived * x, 1)
    weights = scores * _decays(
        coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
    )
    d_input = after[:, None] * arrived + _dot(tl.trans(weights.to(dtype)), dy)
    dx = d_input * delta[:, None] + tl.load(D_ptr + head) * dy_f32
    _store(dx_ptr, dx, batch, head, chunk, p, L, H, P, TOKENS)
    token = row * TOKENS + tl.arange(0, TOKENS)
    tl.store(ddelta_ptr + token, tl.sum(d_input * x, 1))
    # The exponent of a token u is a term of those of the pairs s < u <= t, of the decays from the
    # start to t >= u, and of those to the end from t < u.
    t, u = tl.arange(0, TOKENS)[:, None], tl.arange(0, TOKENS)[None, :]
    of_pairs = _dot(dy, tl.trans((x * delta[:, None]).to(dtype))) * weights
    of_pairs = _dot(of_pairs.to(dtype), (t < u).to(tl.float32).to(dtype))  # [t, u]
    of_u = tl.where(t >= u, of_pairs + of_before[:, None], of_after[:, None])
    tl.store(dexponents_ptr + token, tl.sum(of_u, 0))


@triton.jit
def group_sums(
    x_ptr,
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    document_ptr,
    starts_ptr,
    dy_ptr,
    dends_ptr,
    dB_ptr,
    dC_ptr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store the gradients of B and C, [B, L, G, S], of STATES states."""
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    chunk = tl.program_id(0)
    group = tl.program_id(2) % G
    batch = (tl.program_id(2) // G).to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    p = tl.arange(0, CHANNELS)
    s = tl.program_id(1) * STATES + tl.arange(0, STATES)
    dscores = tl.zeros([TOKENS, TOKENS], tl.float32)
    dB = tl.zeros([TOKENS, STATES], tl.float32)
    dC = tl.zeros([TOKENS, STATES], tl.float32)
    for i in range(H // G):
        head = group * (H // G) + i
        delta, after = _to_end(
            delta_ptr, coarse_ptr, fine_ptr, document_ptr,
            batch, head, chunk, chunks, H, TOKENS, HAS_IDS,
        )  # fmt: skip
        before, _ = _from_start(
            coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
        )
        x = _load(x_ptr, batch, head, chunk, p, L, H, P, TOKENS).to(tl.float32)
        dy = _load(dy_ptr, batch, head, chunk, p, L, H, P, TOKENS)
        u = x * delta[:, None]
        states_at = ((batch * H + head) * chunks + chunk) * P * S
        h = _load_state(starts_ptr + states_at, p, s, P, S)
        dC += _dot((dy.to(tl.float32) * before[:, None]).to(dtype), h)
        dh = _load_state(dends_ptr + states_at, p, s, P, S)
        dB += _dot((u * after[:, None]).to(dtype), dh)
        dscores += _dot(dy, tl.trans(u.to(dtype))) * _decays(
            coarse_ptr, fine_ptr, document_ptr, batch, head, chunk, chunks, H, TOKENS, HAS_IDS
        )
    dscores = dscores.to(dtype)
    B = _load(B_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
    C = _load(C_ptr, batch, group, chunk, s, L, G, S, TOKENS).to(dtype)
    dB += _dot(tl.trans(dscores), C)
    dC += _dot(dscores, B)
    _store(dB_ptr, dB, batch, group, chunk, s, L, G, S, TOKENS)
    _store(dC_ptr, dC, batch, group, chunk, s, L, G, S, TOKENS)


@triton.jit
def _dot(a, b):
    """Return the product in float32, as exact as the operands' dtype."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _load(
    ptr,
    batch,
    row,
    chunk,
    column,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Load the chunk's part [TOKENS, columns] of an array [B, L, ROWS, COLUMNS]."""
    t = tl.arange(0, TOKENS)[:, None]
    first = ((batch * L + chunk * TOKENS) * ROWS + row) * COLUMNS  # in 64 bits, the rest in 32
    at = t * (ROWS * COLUMNS) + column[None, :]
    inside = (t < L - chunk * TOKENS) & (column[None, :] < COLUMNS)
    return tl.load(ptr + first + at, inside, 0.0)


@triton.jit
def _store(
    ptr,
    values,
    batch,
    row,
    chunk,
    column,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Store the chunk's part [TOKENS, columns] of an array [B, L, ROWS, COLUMNS]."""
    t = tl.arange(0, TOKENS)[:, None]
    first = ((batch * L + chunk * TOKENS) * ROWS + row) * COLUMNS
    at = t * (ROWS * COLUMNS) + column[None, :]
    inside = (t < L - chunk * TOKENS) & (column[None, :] < COLUMNS)
    tl.store(ptr + first + at, values.to(ptr.dtype.element_ty), inside)


@triton.jit
def _load_state(ptr, p, s, P: tl.constexpr, S: tl.constexpr):
    """Load channels p and numbers s of the state [P, S] at ptr."""
    inside = (p[:, None] < P) & (s[None, :] < S)
    return tl.load(ptr + p[:, None] * S + s[None, :], inside, 0.0)


@triton.jit
def _decays(
    coarse_ptr,
    fine_ptr,
    document_ptr,
    batch,
    head,
    chunk,
    chunks: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Return the decays from s to t [t, s], 0 unless s <= t is of the same document."""
    t = tl.arange(0, TOKENS)
    first = ((batch * H + head) * chunks + chunk) * TOKENS
    coarse, fine = tl.load(coarse_ptr + first + t), tl.load(fine_ptr + first + t)
    exponents = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    seen = t[:, None] >= t[None, :]
    if HAS_IDS:
        document = tl.load(document_ptr + (batch * chunks + chunk) * TOKENS + t)
        seen = seen & (document[:, None] == document[None, :])
    return tl.exp2(tl.where(seen, exponents, float("-inf")))


@triton.jit
def _from_start(
    coarse_ptr,
    fine_ptr,
    document_ptr,
    batch,
    head,
    chunk,
    chunks: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Return the decays from the chunk's start to its tokens [TOKENS] and to its end."""
    t = tl.arange(0, TOKENS)
    first = ((batch * H + head) * chunks + chunk) * TOKENS
    last = first + TOKENS - 1
    before = tl.exp2(tl.load(coarse_ptr + first + t) + tl.load(fine_ptr + first + t))
    keep = tl.exp2(tl.load(coarse_ptr + last) + tl.load(fine_ptr + last))
    if HAS_IDS:
        document_ptr += (batch * chunks + chunk) * TOKENS
        before = tl.where(tl.load(document_ptr + t) == 0, before, 0.0)
        keep = tl.where(tl.load(document_ptr + TOKENS - 1) == 0, keep, 0.0)
    return before, keep


@triton.jit
def _to_end(
    delta_ptr,
    coarse_ptr,
    fine_ptr,
    document_ptr,
    batch,
    head,
    chunk,
    chunks: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Return the tokens' time steps and their decays to the chunk's end, [TOKENS] each."""
    t = tl.arange(0, TOKENS)
    first = ((batch * H + head) * chunks + chunk) * TOKENS
    last = first + TOKENS - 1
    coarse, fine = tl.load(coarse_ptr + first + t), tl.load(fine_ptr + first + t)
    exponents = (tl.load(coarse_ptr + last) - coarse) + (tl.load(fine_ptr + last) - fine)
    after = tl.exp2(exponents)
    if HAS_IDS:
        document_ptr += (batch * chunks + chunk) * TOKENS
        is_last = tl.load(document_ptr + t) == tl.load(document_ptr + TOKENS - 1)
        after = tl.where(is_last, after, 0.0)
    return tl.load(delta_ptr + first + t), after
