"""The operations of `kernels` as plain formulas, computed in float64 on the CPU.

They share no code with the kernels: loops over tokens, whole matrices of scores, all logits. They
are for small shapes; `sampled_reference` samples large ones.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function, arguments, cotangents):
    """Return a function's outputs in float64, and its gradients for the cotangents.

    Args:
      function: takes the arguments by name.
      arguments: arrays by name; floats become float64, others have no gradient.
      cotangents: the cotangents of the outputs.

    Returns:
      (outputs, gradients of the float arguments by name), NumPy arrays.
    """
    with jax.enable_x64(True), jax.default_device(_cpu()):
        arguments, cotangents = jax.tree.map(_as_float64, (arguments, cotangents))
        return jax.tree.map(np.asarray, _with_gradients(function, arguments, cotangents))


@partial(jax.jit, static_argnums=0)
def _with_gradients(function, arguments, cotangents):
    floats = {name: x for name, x in arguments.items() if x.dtype == jnp.float64}
    outputs, vjp = jax.vjp(lambda floats: function(**(arguments | floats)), floats)
    return outputs, vjp(cotangents)[0]


def _cpu():
    """Return the CPU device, or None, the default device, if JAX has no CPU backend."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _as_float64(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(np.asarray(x, np.float64)) if is_float else np.asarray(x)


def selective_scan(u, dt, A, B, C, D, z=None, dt_bias=None, segment_ids=None, initial_state=None):
    """Return (y [B, L, E], final state [B, E, S]) of a selective scan."""
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
    """Return (y [B, L, E], final state [B, W - 1, E]): the last inputs."""
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
    """Return the weighted losses [N] of the tokens; a token of weight zero may have any target."""
    logits = hidden @ head
    picked = logits[np.arange(len(targets)), jnp.clip(targets, 0, head.shape[1] - 1)]
    lse = jax.nn.logsumexp(logits, -1)
    return weights * (lse - picked + z_loss * lse**2)


def ssd(x, dt, A, B, C, D, dt_bias=None, segment_ids=None, initial_state=None):
    """Return (y [B, L, H, P], final state [B, H, P, S])."""
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
