"""The operations in float64 with NumPy, on a sample of channels, query rows or tokens.

At the benchmark's sizes the whole computation in float64 would take longer than the benchmark. Each
function takes float64 arrays and returns the outputs and, for the given cotangents, the gradients
of all arguments by name. A gradient that sums over the whole array holds the sample's part only.
"""

import numpy as np
from numpy import ndarray

Gradients = dict[str, ndarray]

_SCAN = ("u", "delta", "A", "B", "C")


def _sigmoid(x: ndarray) -> ndarray:
    return 1 / (1 + np.exp(-x))


def scan(
    u: ndarray, delta: ndarray, A: ndarray, B: ndarray, C: ndarray, dy: ndarray
) -> tuple[ndarray, Gradients]:
    """Return y [L, E] of a selective scan over the sampled channels, and gradients.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t, with u, delta, dy [L, E],
    A [E, S], B, C [L, S].
    """
    length = len(u)
    h = np.zeros((length + 1, *A.shape))  # h[t + 1] is the state after token t
    for t in range(length):
        decay = np.exp(delta[t, :, None] * A)
        h[t + 1] = decay * h[t] + (delta[t] * u[t])[:, None] * B[t]
    grads = {name: np.zeros_like(x) for name, x in zip(_SCAN, (u, delta, A, B, C), strict=True)}
    g = np.zeros_like(A)
    for t in reversed(range(length)):
        g = g + dy[t, :, None] * C[t]
        through = g @ B[t]
        grads["B"][t] = (delta[t] * u[t]) @ g
        g = g * np.exp(delta[t, :, None] * A)
        grads["u"][t] = delta[t] * through
        grads["delta"][t] = u[t] * through + (g * h[t] * A).sum(-1)
        grads["A"] += g * h[t] * delta[t, :, None]
    grads["C"] = np.einsum("le,les->ls", dy, h[1:])
    return np.einsum("les,ls->le", h[1:], C), grads


def selective_scan(u, dt, A, B, C, D, z, dt_bias, dy) -> tuple[ndarray, Gradients]:
    """Return y [L, E] of the gated scan, and gradients; arguments have no batch dimension."""
    before = dt + dt_bias
    delta = np.logaddexp(0, before)
    gate = _sigmoid(z)
    ds = dy * z * gate
    state, grads = scan(u, delta, A, B, C, ds)
    s = state + D * u
    grads["dt"] = grads.pop("delta") * _sigmoid(before)
    grads["u"] += D * ds
    grads |= {"D": (ds * u).sum(0), "dt_bias": grads["dt"].sum(0)}
    grads["z"] = dy * s * gate * (1 + z * (1 - gate))
    return s * z * gate, grads


def ssd(x, dt, A, B, C, D, dy) -> tuple[ndarray, Gradients]:
    """Return y [L, P] of sampled channels of one head, and gradients.

    It is a scan in which all channels share one decay and one skip: x, dy [L, P], dt [L], A and D
    scalars, B, C [L, S].
    """
    delta = np.logaddexp(0, dt)[:, None] * np.ones_like(x)
    y, grads = scan(x, delta, np.full((x.shape[1], B.shape[1]), A), B, C, dy)
    ddelta = grads.pop("delta").sum(1)
    return y + D * x, grads | {
        "x": grads.pop("u") + D * dy,
        "dt": ddelta * _sigmoid(dt),
        "A": grads["A"].sum(),
        "D": (dy * x).sum(),
    }


def attention(
    q: ndarray, k: ndarray, v: ndarray, positions: ndarray, dout: ndarray
) -> tuple[ndarray, Gradients]:
    """Return outputs [n, K] of queries q [n, K] at `positions` over k, v [T, K], and gradients."""
    scale = q.shape[-1] ** -0.5
    scores = np.where(np.arange(len(k)) <= positions[:, None], q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    dscores = weights * (dout @ v.T - (dout * out).sum(-1, keepdims=True)) * scale
    return out, {"q": dscores @ k, "k": dscores.T @ q, "v": weights.T @ dout}


def cross_entropy(
    hidden: ndarray, head: ndarray, targets: ndarray, weights: ndarray
) -> tuple[ndarray, Gradients]:
    """Return the weighted sum of the losses of the sampled tokens, and gradients."""
    logits = hidden @ head
    logits -= logits.max(-1, keepdims=True)
    softmax = np.exp(logits)
    total = softmax.sum(-1, keepdims=True)
    rows = np.arange(len(targets))
    losses = np.log(total[:, 0]) - logits[rows, targets]
    softmax /= total
    softmax[rows, targets] -= 1
    dlogits = weights[:, None] * softmax
    grads = {"hidden": dlogits @ head.T, "head": hidden.T @ dlogits, "weights": losses}
    return weights @ losses, grads


def causal_conv(x, weight, bias, dy) -> tuple[ndarray, Gradients]:
    """Return y [L, E] of x [L, E] with taps `weight` [W, E], and gradients."""
    taps, length = len(weight), len(x)
    y, dx, dweight = np.zeros_like(x) + bias, np.zeros_like(x), np.zeros_like(weight)
    for k in range(min(taps, length)):  # the input of k positions earlier
        y[k:] += weight[taps - 1 - k] * x[: length - k]
        dx[: length - k] += weight[taps - 1 - k] * dy[k:]
        dweight[taps - 1 - k] = (dy[k:] * x[: length - k]).sum(0)
    return y, {"x": dx, "weight": dweight, "bias": dy.sum(0)}
