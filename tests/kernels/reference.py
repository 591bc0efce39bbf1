"""The operations of `kernels` as plain formulas for float64, and what their tests share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function, arguments, cotangents):
    """Outputs of a function at the arguments' values and its gradients for the cotangents.

    Runs in float64; integer arguments stay as they are and have no gradient.
    """
    with jax.enable_x64(True):
        arguments, cotangents = jax.tree.map(_as_float64, (arguments, cotangents))
        return jax.tree.map(np.asarray, _with_gradients(function, arguments, cotangents))


@partial(jax.jit, static_argnums=0)
def _with_gradients(function, arguments, cotangents):
    floats = {name: x for name, x in arguments.items() if x.dtype == jnp.float64}
    outputs, vjp = jax.vjp(lambda floats: function(**(arguments | floats)), floats)
    return outputs, vjp(cotangents)[0]


def _as_float64(x):
    integer = np.issubdtype(x.dtype, np.integer)
    return np.asarray(x) if integer else jnp.asarray(np.asarray(x, np.float64))


def assert_close(actual, expected, tolerance, scale=1e-9):
    """Every difference is below the tolerance times the largest expected magnitude.

    A tensor below `scale` may differ as one of that magnitude: what is a small difference of terms
    is rounded as they are, and what is zero but for the rounding of float64 as that is.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a = np.asarray(a, np.float64)
        assert a.shape == e.shape, path
        error = np.max(np.abs(a - e), initial=0)
        assert error <= tolerance * np.max(np.abs(e), initial=scale), (path, error)


def cotangents_like(rng, outputs):
    """Random arrays of the shapes and dtypes of the outputs (or of their `jax.eval_shape`)."""
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), outputs)


def array_sizes(jaxpr):
    """The sizes of all arrays that a jaxpr computes, also in the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)


def selective_scan(u, dt, A, B, C, D, z=None, dt_bias=None, segment_ids=None, initial_state=None):
    """Return (y, final state)."""
    batch, length, _ = u.shape
    delta = jnp.log1p(jnp.exp(dt if dt_bias is None else dt + dt_bias))
    ids = jnp.zeros((batch, length), int) if segment_ids is None else segment_ids
    same = jnp.concatenate([jnp.ones((batch, 1)), ids[:, 1:] == ids[:, :-1]], 1)

    def step(h, token):
        u, delta, B, C, same = token
        h = same[:, None, None] * h
        h = jnp.exp(delta[:, :, None] * A) * h + (delta * u)[:, :, None] * B[:, None, :]
        return h, (h * C[:, None, :]).sum(-1) + D * u

    h = jnp.zeros((batch, *A.shape)) if initial_state is None else initial_state
    tokens = [x.swapaxes(0, 1) for x in (u, delta, B, C, same)]
    h, y = jax.lax.scan(step, h, tokens)
    y = y.swapaxes(0, 1)
    return (y if z is None else y * z / (1 + jnp.exp(-z))), h


def causal_conv(x, weight, bias=None, segment_ids=None, initial_state=None):
    """Return (y, final state)."""
    batch, length, width = x.shape
    taps = weight.shape[0]
    before = jnp.zeros((batch, taps - 1, width)) if initial_state is None else initial_state
    inputs = jnp.concatenate([before, x], 1)
    ids = jnp.zeros((batch, length), int) if segment_ids is None else segment_ids
    ids = jnp.concatenate([jnp.repeat(ids[:, :1], taps - 1, 1), ids], 1)
    reach = np.arange(length)[:, None] + np.arange(taps)  # [L, W], indices into inputs
    same = ids[:, reach] == ids[:, taps - 1 :, None]
    seen = inputs[:, reach] * same[..., None]  # [B, L, W, E]
    y = jnp.einsum("blwe,we->ble", seen, weight)
    return (y if bias is None else y + bias), seen[:, -1, 1:]


def attention(q, k, v, segment_ids=None, *, window=None, prefix=0):
    """Return the outputs [B, T, H, K]."""
    batch, length, heads, size = q.shape
    k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    ids = jnp.zeros((batch, length), int) if segment_ids is None else segment_ids
    seen = jnp.tril(ids[:, :, None] == ids[:, None, :])[:, None]
    if window is not None:
        seen = jnp.triu(seen, 1 - window)
    seen = seen | (jnp.tri(length, dtype=bool) & (jnp.arange(length) < prefix))
    weights = seen * jnp.exp(jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(size))
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def cross_entropy(hidden, head, targets, weights, z_loss=0.0):
    """Weighted losses of the tokens; those of weight zero may have any target."""
    logits = hidden @ head
    picked = logits[np.arange(len(targets)), jnp.clip(targets, 0, head.shape[1] - 1)]
    lse = jnp.log(jnp.exp(logits).sum(-1))
    return weights * (lse - picked + z_loss * lse**2)


def ssd(x, dt, A, B, C, D, dt_bias=None, segment_ids=None, initial_state=None):
    """Return (y, final state)."""
    batch, length, heads, size = x.shape
    delta = jnp.log1p(jnp.exp(dt if dt_bias is None else dt + dt_bias))
    B, C = (jnp.repeat(v, heads // v.shape[2], axis=2) for v in (B, C))
    ids = jnp.zeros((batch, length), int) if segment_ids is None else segment_ids
    same = jnp.concatenate([jnp.ones((batch, 1)), ids[:, 1:] == ids[:, :-1]], 1)

    def step(h, token):
        x, delta, B, C, same = token
        decay = same[:, None] * jnp.exp(delta * A)
        h = decay[:, :, None, None] * h
        h = h + (delta[:, :, None] * x)[..., None] * B[:, :, None, :]
        return h, (h * C[:, :, None, :]).sum(-1) + D[:, None] * x

    h = jnp.zeros((batch, heads, size, B.shape[-1])) if initial_state is None else initial_state
    h, y = jax.lax.scan(step, h, [v.swapaxes(0, 1) for v in (x, delta, B, C, same)])
    return y.swapaxes(0, 1), h
