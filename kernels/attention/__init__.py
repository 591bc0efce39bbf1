"""Causal grouped-query attention."""

import math
from functools import partial

import jax.numpy as jnp
from jax import Array

from kernels.attention import cudnn, splash, xla
from kernels.attention.step import attention_step
from kernels.backends import Backend, Operation
from kernels.checks import check_arguments
from kernels.partition import constrain, over_mesh, ways

__all__ = ["OPERATION", "attention", "attention_step"]

_LAYOUTS = ("B T heads size", "B T kv_heads size", "B T kv_heads size", "B T")

OPERATION = Operation(
    "attention",
    {
        "splash": Backend(splash.attention, ("tpu",), splash.unsupported),
        "cudnn": Backend(cudnn.attention, ("gpu",), cudnn.unsupported),
        "xla": Backend(xla.attention),
    },
    {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("xla",)},
)


def attention(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None = None,
    *,
    window: int | None = None,
    prefix: int = 0,
    backend: str | None = None,
) -> Array:
    """Causal attention with H query heads that share H_kv key-value heads (GQA, arXiv 2305.13245).

    Query head h uses key-value head h // (H / H_kv); scores are scaled by K**-0.5; the softmax is
    float32. The weight of a masked token is zero. Where it is differentiated, 'xla' keeps the
    weights of all heads, [B, H, T, about T / 2], for the backward pass; the others compute them
    again, block by block.

    Args:
      q: queries [B, T, H, K], any float dtype.
      k: keys [B, T, H_kv, K]; H is a multiple of H_kv.
      v: values [B, T, H_kv, K].
      segment_ids: documents, [B, T], integer: a token attends within its document alone. None: one
        document.
      window: number of positions that a token sees, its own included; None: all up to its own.
      prefix: number of leading positions that all later ones see, whatever the window and their
        document, as Hymba's meta tokens (arXiv 2411.13676, section 2.4).
      backend: 'splash' (TPU), 'cudnn' (NVIDIA) or 'xla'; None: see `kernels.backends`.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      ValueError: if a dtype is not as above, an array is empty or shapes do not fit each other,
        window is below 1, prefix not 0 to T, or `backend` is unknown or cannot serve.
    """
    sizes = check_arguments(
        "attention",
        {"q": (q, "B T H K"), "k": (k, "B T H_kv K"), "v": (v, "B T H_kv K")},
        {"segment_ids": (segment_ids, "B T")},
        integers=("segment_ids",),
    )
    if sizes["H"] % sizes["H_kv"]:
        raise ValueError(
            f"attention: the {sizes['H']} query heads must be a multiple of the "
            f"{sizes['H_kv']} key-value heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, found {window}")
    if not 0 <= prefix <= sizes["T"]:
        raise ValueError(f"attention: prefix must be 0 to T = {sizes['T']}, found {prefix}")
    repeats = math.lcm(sizes["H_kv"], ways("heads")) // sizes["H_kv"]
    if repeats > 1 and sizes["H"] // sizes["H_kv"] % repeats == 0:  # so that heads can be cut
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    q, k, v = (_by_position(x) for x in (q, k, v))
    run = OPERATION.choose(q, k, v, segment_ids, prefix, backend=backend)
    options = {"window": window} | ({"prefix": prefix} if prefix else {})
    out = over_mesh(partial(run, **options), _LAYOUTS, _LAYOUTS[0])(q, k, v, segment_ids)
    return _by_position(out)


def _by_position(x: Array) -> Array:
    """x [B, T, H, K], cut over `sequence` by positions, where there are such devices.

    Heads and positions then change places between attention and the products around it. Left to
    itself XLA makes the products of heads, for which it gathers all positions of their inputs.
    """
    return constrain(x, "B L H size") if ways("L") > 1 else x
