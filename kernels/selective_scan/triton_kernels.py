"""The selective scan as Triton kernels. Imported only where Triton is installed.

A program has CHANNELS channels of one sequence and walks over it in chunks of TOKENS tokens. In a
chunk it works in two ways. What has no states (softplus, gate, skip) is computed for tiles
[TOKENS, CHANNELS], once for all states, by all warps together. The scan itself takes STATES states
of each channel at a time, in tiles [STATES, CHANNELS] of one number per thread, and tuples hold the
tiles of a chunk's tokens: scans over time are plain multiplications and additions in registers,
without any exchange between threads. With 32 channels, each warp has its own states; with fewer, a
warp has several states of each channel. Between the two, rows go through shared memory: a token's
row to all warps (`_rows`), and the sums over states back (`_sum_states`).

The state between two chunks passes through global memory (which the cache keeps): the number of
registers does not depend on the number of states, and the gradient needs it there in any case.

Arrays are those of `kernels.selective_scan`, but with the states before the channels (A [S, E],
states [..., S, E]), so that the threads of a warp read adjacent numbers, and with B and C
in float32. Row numbers have 64 bits. An array whose HAS_ flag is off is not read.
"""

# ruff: noqa: RUF005 - Triton has no unpacking inside a tuple
# Triton's annotations do not make static_range iterable, which only its compiler does.
# pyright: reportGeneralTypeIssues=false
# Without Triton, pyright takes the file triton.py next to this one for it.
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    ids_ptr,
    initial_ptr,
    y_ptr,
    last_ptr,
    starts_ptr,
    L: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    KEEPS_STARTS: tl.constexpr,
):
    """Store y [B, L, E], the last state [B, S, E] and, if kept, starts [B, chunks, S, E].

    The starts are the states before each chunk.
    """
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    groups: tl.constexpr = (S + STATES - 1) // STATES
    t = tl.arange(0, TOKENS)[:, None]
    e = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    D = tl.load(D_ptr + e, e < E, 0.0)
    bias = tl.load(bias_ptr + e, e < E, 0.0) if HAS_BIAS else 0.0
    _copy_states(last_ptr, initial_ptr, batch, e, E, S, STATES)

    for chunk in range(chunks):
        rows = (batch * L + chunk * TOKENS + t) * E + e
        inside = (e < E) & (chunk * TOKENS + t < L)
        u = tl.load(u_ptr + rows, inside, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + rows, inside, 0.0).to(tl.float32) + bias
        steps = tl.where(inside, _softplus(dt), 0.0)
        delta, x = _two_rows(steps, steps * u, TOKENS, CHANNELS)
        keep, y = (), ()
        for i in tl.static_range(TOKENS):
            keep = keep + (_continues(ids_ptr, batch, chunk * TOKENS + i, L, HAS_IDS),)
            y = y + (tl.zeros([STATES, CHANNELS], tl.float32),)
        for group in range(groups):
            s = group * STATES + tl.arange(0, STATES)[:, None]
            at, exists = s * E + e, (s < S) & (e < E)
            A = tl.load(A_ptr + at, exists, 0.0) * _LOG2_E
            h = tl.load(last_ptr + batch * S * E + at, exists, 0.0)
            if KEEPS_STARTS:
                tl.store(starts_ptr + (batch * chunks + chunk) * S * E + at, h, exists)
            y_before = y
            y = ()
            for i in tl.static_range(TOKENS):
                token = chunk * TOKENS + i
                place, there = (batch * L + token) * S + s, (s < S) & (token < L)
                B = tl.load(B_ptr + place, there, 0.0)
                C = tl.load(C_ptr + place, there, 0.0)
                h = _decay(delta[i], A, keep[i], HAS_IDS) * h + x[i] * B
                y = y + (y_before[i] + C * h,)
            tl.store(last_ptr + batch * S * E + at, h, exists)
        out = _sum_states(y, TOKENS, CHANNELS) + D * u
        if HAS_Z:
            z = tl.load(z_ptr + rows, inside, 0.0).to(tl.float32)
            out *= z * tl.sigmoid(z)
        tl.store(y_ptr + rows, out.to(y_ptr.dtype.element_ty), inside)
        tl.debug_barrier()


@triton.jit
def backward(
    u_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    ids_ptr,
    starts_ptr,
    dy_ptr,
    dlast_ptr,
    du_ptr,
    ddt_ptr,
    dz_ptr,
    dB_ptr,
    dC_ptr,
    dA_ptr,
    dD_ptr,
    dbias_ptr,
    dinitial_ptr,
    L: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """Store the gradients, from the last chunk to the first.

    Those of arrays without a batch dimension are stored per sequence: dA [B, S, E], dD and dbias
    [B, E]. Those of B and C are stored per program, of its channels: dB and dC [programs, B, S, L].
    """
    chunks: tl.constexpr = (L + TOKENS - 1) // TOKENS
    groups: tl.constexpr = (S + STATES - 1) // STATES
    t = tl.arange(0, TOKENS)[:, None]
    e = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    sequences = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + batch  # before this one
    D = tl.load(D_ptr + e, e < E, 0.0)
    bias = tl.load(bias_ptr + e, e < E, 0.0) if HAS_BIAS else 0.0
    of_channels = tl.zeros([CHANNELS, 2], tl.float32)  # the gradients of D and of the bias
    _copy_states(dinitial_ptr, dlast_ptr, batch, e, E, S, STATES)

    for step in range(chunks):
        chunk = chunks - 1 - step
        rows = (batch * L + chunk * TOKENS + t) * E + e
        inside = (e < E) & (chunk * TOKENS + t < L)
        u = tl.load(u_ptr + rows, inside, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + rows, inside, 0.0).to(tl.float32) + bias
        steps = tl.where(inside, _softplus(dt), 0.0)
        dout = tl.load(dy_ptr + rows, inside, 0.0).to(tl.float32)
        if HAS_Z:
            z = tl.load(z_ptr + rows, inside, 0.0).to(tl.float32)
            dout *= z * tl.sigmoid(z)
        delta, x = _two_rows(steps, steps * u, TOKENS, CHANNELS)
        dy = _rows(tl.trans(dout), TOKENS, CHANNELS)
        keep, y, dx, dexponent = (), (), (), ()
        for i in tl.static_range(TOKENS):
            keep = keep + (_continues(ids_ptr, batch, chunk * TOKENS + i, L, HAS_IDS),)
            zero = tl.zeros([STATES, CHANNELS], tl.float32)
            y, dx, dexponent = y + (zero,), dx + (zero,), dexponent + (zero,)
        for group in range(groups):
            s = group * STATES + tl.arange(0, STATES)[:, None]
            at, exists = s * E + e, (s < S) & (e < E)
            A = tl.load(A_ptr + at, exists, 0.0)
            h = tl.load(starts_ptr + (batch * chunks + chunk) * S * E + at, exists, 0.0)
            sums_at = (sequences * S + s) * L  # in dB and dC
            decay, decayed, dC = (), (), ()
            y_before = y
            y = ()
            for i in tl.static_range(TOKENS):
                token = chunk * TOKENS + i
                place, there = (batch * L + token) * S + s, (s < S) & (token < L)
                B = tl.load(B_ptr + place, there, 0.0)
                decay_i = _decay(delta[i], A * _LOG2_E, keep[i], HAS_IDS)
                decayed_i = decay_i * h
                h = decayed_i + x[i] * B
                decay, decayed, dC = decay + (decay_i,), decayed + (decayed_i,), dC + (h * dy[i],)
                if HAS_Z:
                    C = tl.load(C_ptr + place, there, 0.0)
                    y = y + (y_before[i] + C * h,)
                else:
                    y = y + (y_before[i],)
            _store_sums(dC, dC_ptr + sums_at, chunk, s < S, L, TOKENS, CHANNELS, STATES)
            dh = tl.load(dinitial_ptr + batch * S * E + at, exists, 0.0)  # after the chunk
            dA = tl.zeros([STATES, CHANNELS], tl.float32)
            dB, dx_after, dexponent_after = (), (), ()
            for i in tl.static_range(TOKENS - 1, -1, -1):
                token = chunk * TOKENS + i
                place, there = (batch * L + token) * S + s, (s < S) & (token < L)
                B = tl.load(B_ptr + place, there, 0.0)
                C = tl.load(C_ptr + place, there, 0.0)
                g = dh + C * dy[i]
                dh = decay[i] * g
                of_exponent = g * decayed[i]  # the gradient of delta * A
                dA += of_exponent * delta[i]
                dB = (g * x[i],) + dB
                dx_after = (dx[i] + g * B,) + dx_after
                dexponent_after = (dexponent[i] + of_exponent * A,) + dexponent_after
            dx, dexponent = dx_after, dexponent_after
            tl.store(dinitial_ptr + batch * S * E + at, dh, exists)
            dA += tl.load(dA_ptr + batch * S * E + at, exists & (step > 0), 0.0)
            tl.store(dA_ptr + batch * S * E + at, dA, exists)
            _store_sums(dB, dB_ptr + sums_at, chunk, s < S, L, TOKENS, CHANNELS, STATES)
        # Inputs are loaded again: kept in registers during the scan, they would make it spill.
        u = tl.load(u_ptr + rows, inside, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + rows, inside, 0.0).to(tl.float32) + bias
        of_y = tl.load(dy_ptr + rows, inside, 0.0).to(tl.float32)
        dout = of_y
        if HAS_Z:
            z = tl.load(z_ptr + rows, inside, 0.0).to(tl.float32)
            dout *= z * tl.sigmoid(z)
        of_x = _sum_states(dx, TOKENS, CHANNELS)
        ddt = (_sum_states(dexponent, TOKENS, CHANNELS) + of_x * u) * tl.sigmoid(dt)
        du = of_x * steps + D * dout
        tl.store(du_ptr + rows, du.to(du_ptr.dtype.element_ty), inside)
        tl.store(ddt_ptr + rows, ddt.to(ddt_ptr.dtype.element_ty), inside)
        of_channels += tl.sum(tl.join(dout * u, tl.where(inside, ddt, 0.0)), 0)
        if HAS_Z:
            gate = tl.sigmoid(z)
            out = _sum_states(y, TOKENS, CHANNELS) + D * u
            dz = of_y * out * gate * (1 + z * (1 - gate))
            tl.store(dz_ptr + rows, dz.to(dz_ptr.dtype.element_ty), inside)
        tl.debug_barrier()
    dD, dbias = tl.split(of_channels)
    tl.store(dD_ptr + batch * E + e, dD[None, :], e < E)
    tl.store(dbias_ptr + batch * E + e, dbias[None, :], e < E)


@triton.jit
def _copy_states(
    to_ptr, from_ptr, batch, e, E: tl.constexpr, S: tl.constexpr, STATES: tl.constexpr
):
    """Copy the program's states of one array [B, S, E] to another."""
    for group in range((S + STATES - 1) // STATES):
        s = group * STATES + tl.arange(0, STATES)[:, None]
        at, exists = (batch * S + s) * E + e, (s < S) & (e < E)
        tl.store(to_ptr + at, tl.load(from_ptr + at, exists, 0.0), exists)
    tl.debug_barrier()


@triton.jit
def _softplus(x):
    """Return max(x, 0) + log(1 + p), p = exp(-|x|), as exact as p even if p is small.

    log(1 + p) = 2 artanh(r), r = p / (2 + p) <= 1/3, by the series of artanh.
    """
    p = tl.exp(-tl.abs(x))
    r = p / (2 + p)
    square = r * r
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13))
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series))
    return tl.maximum(x, 0.0) + 2 * r * (1 + square * series)


@triton.jit
def _continues(ids_ptr, batch, token, L: tl.constexpr, HAS_IDS: tl.constexpr):
    """Return whether a token belongs to the document of the token before."""
    follows = (token > 0) & (token < L)
    if HAS_IDS:
        here = ids_ptr + batch * L + token
        follows = tl.load(here, follows, 0) == tl.load(here - 1, follows, 0)
    return follows


@triton.jit
def _two_rows(first, second, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the rows of two tiles [TOKENS, CHANNELS] as two tuples of tiles [1, CHANNELS].

    Triton would let every warp compute all rows of a single tile, rather than exchange them.
    """
    both = tl.permute(tl.join(first, second), (1, 0, 2))
    rows = _rows(tl.reshape(both, [CHANNELS, 2 * TOKENS]), 2 * TOKENS, CHANNELS)
    firsts, seconds = (), ()
    for i in tl.static_range(TOKENS):
        firsts, seconds = firsts + (rows[2 * i],), seconds + (rows[2 * i + 1],)
    return firsts, seconds


@triton.jit
def _rows(x, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the columns of a tile [CHANNELS, COUNT] as a tuple of tiles [1, CHANNELS]."""
    rows = (x,)
    for i in tl.static_range(6):
        if 1 << i < COUNT:
            halves = ()
            for v in tl.static_range(1 << i):
                pairs = tl.reshape(rows[v], [CHANNELS, 2, COUNT >> (i + 1)])
                first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
                halves = halves + (first, second)
            rows = halves
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (tl.reshape(rows[i], [1, CHANNELS]),)
    return result


@triton.jit
def _sum_states(values, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the sums over states of the tiles [STATES, CHANNELS] of each token, as one tile."""
    for i in tl.static_range(5):
        if 1 << i < TOKENS:
            pairs = ()
            for v in tl.static_range(TOKENS >> (i + 1)):
                pairs = pairs + (tl.join(values[v], values[v + (TOKENS >> (i + 1))]),)
            values = pairs
    return tl.trans(tl.reshape(tl.sum(values[0], 0), [CHANNELS, TOKENS]))


@triton.jit
def _decay(delta, A, keep, HAS_IDS: tl.constexpr):
    """Return exp(delta A), given A * log2(e); 0 where the state is reset."""
    decay = tl.exp2(delta * A)
    if HAS_IDS:
        decay = tl.where(keep, decay, 0.0)
    return decay


@triton.jit
def _store_sums(
    values,
    to,
    chunk,
    exists,
    L: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """Sum the tiles [STATES, CHANNELS] of each token over the channels; store the chunk's sums.

    At each step every thread gives half of its tiles to its partner and adds the half it gets to
    the rest: about one exchange per tile in all, while summing each tile takes log2(CHANNELS).
    Thread i ends with the sums of tokens i, i + CHANNELS, ...
    """
    lane = tl.arange(0, CHANNELS)[None, :]
    for i in tl.static_range(5):
        if 1 << i < CHANNELS:
            values = _exchange(values, TOKENS >> i, 1 << i, CHANNELS, STATES)
    for v in tl.static_range((TOKENS + CHANNELS - 1) // CHANNELS):
        token = chunk * TOKENS + v * CHANNELS + lane
        tl.store(to + token, values[v], exists & (token < L) & (lane < TOKENS))


@triton.jit
def _exchange(
    values,
    count: tl.constexpr,
    distance: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """Return half as many tiles, sums over two threads; a single tile is summed in both."""
    lane = tl.arange(0, CHANNELS)[None, :]
    partner = tl.broadcast_to(lane ^ distance, [STATES, CHANNELS])
    if count > 1:
        odd = (lane & distance) != 0
        sums = ()
        for v in tl.static_range(count // 2):
            given = tl.where(odd, values[2 * v], values[2 * v + 1])
            kept = tl.where(odd, values[2 * v + 1], values[2 * v])
            sums = sums + (kept + tl.gather(given, partner, 1),)
    else:
        sums = (values[0] + tl.gather(values[0], partner, 1),)
    return sums
