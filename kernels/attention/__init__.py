"""Causal grouped-query attention."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.attention import cudnn, splash, xla
from kernels.attention.inputs import AttentionInputs, Visibility
from kernels.attention.step import attention_step
from kernels.backends import Backend, Operation, target_platform
from kernels.checks import check_arguments, check_groups
from kernels.partition import constrain, num_parts, over_mesh

__all__ = ["OPERATION", "attention", "attention_step", "padded_length"]

# Of the fields of `AttentionInputs`; the result has the first.
_LAYOUTS = ("B Q heads size", "B T kv_heads size", "B T kv_heads size", "B T")

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
    queries: tuple[int, ...] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Array:
    """Return causal attention of H query heads on H_kv key-value heads (GQA, arXiv 2305.13245).

    Query head h uses key-value head h // (H / H_kv); the softmax is float32. The weight of a masked
    token is zero. If it is differentiated, 'xla' keeps the weights of all heads, [B, H, T, about
    T / 2], for the backward pass; the other backends recompute them block by block.

    Args:
      q: queries [B, T, H, K], or [B, Q, H, K] with `queries`; any float dtype.
      k: keys [B, T, H_kv, K]; H is a multiple of H_kv.
      v: values [B, T, H_kv, K].
      segment_ids: documents, [B, T], integer: a token attends only within its document. None: one
        document.
      window: number of positions that a token sees, its own included; None: all up to its own.
      prefix: number of leading positions that all later ones see regardless of window and
        document, as Hymba's meta tokens (arXiv 2411.13676, section 2.4).
      queries: positions of the Q queries among the T keys, ascending, which 'xla' alone supports;
        None: all T.
      scale: factor on the scores q k; None: K**-0.5.
      backend: 'splash' (TPU), 'cudnn' (NVIDIA) or 'xla'; None: see `kernels.backends`.

    Returns:
      [B, T, H, K], or [B, Q, H, K], in q's dtype.

    Raises:
      ValueError: a dtype is not as above, an array is empty, shapes do not match each other, window
        is below 1, prefix not 0 to T, queries not Q ascending positions below T, or `backend` is
        unknown or cannot run them.
    """
    sizes = check_arguments(
        "attention",
        {"q": q, "k": k, "v": v, "segment_ids": segment_ids},
        ("B T H K" if queries is None else "B Q H K", "B T H_kv K", "B T H_kv K", "B T"),
        optional=("segment_ids",),
        integers=("segment_ids",),
    )
    check_groups("attention", sizes["H"], sizes["H_kv"], "key-value heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1; got {window}")
    if not 0 <= prefix <= sizes["T"]:
        raise ValueError(f"attention: prefix must be 0 to T = {sizes['T']}; got {prefix}")
    if queries is not None and not _ascend(queries, sizes["Q"], sizes["T"]):
        raise ValueError(
            f"attention: queries must be {sizes['Q']} ascending positions below {sizes['T']}; got "
            f"{queries!r:.80}"
        )
    repeats = math.lcm(sizes["H_kv"], num_parts("heads")) // sizes["H_kv"]
    if repeats > 1 and sizes["H"] // sizes["H_kv"] % repeats == 0:  # to shard heads
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    q, k, v = (_by_position(x) for x in (q, k, v))
    inputs = AttentionInputs(q, k, v, segment_ids)
    visibility = Visibility(window, prefix, queries)
    factor = sizes["K"] ** -0.5 if scale is None else scale
    run = OPERATION.choose(inputs, visibility, backend=backend)

    def on_device(*arrays: Array) -> Array:
        return run(AttentionInputs(*arrays), visibility, factor)

    return _by_position(over_mesh(on_device, _LAYOUTS, _LAYOUTS[0])(*inputs))


def padded_length(length: int, dtype: jnp.dtype, *, prefix: int = 0) -> int:
    """Return the length, at least `length`, to which this platform's backend would pad q, k and v.

    A layer should pad its input to it before it projects q, k and v, which saves their copies;
    causality hides the padding at the end. Where the mesh shards heads, it is `length`
    itself: each device would save the copies of a few heads only, but compute its products at all
    padded positions.

    Args:
      length: number of positions, T.
      dtype: the dtype of q, k and v.
      prefix: as in `attention`.
    """
    x: Any = jax.ShapeDtypeStruct((1, length, 1, 1), dtype)
    if target_platform() != "tpu" or num_parts("heads") > 1:
        return length
    if splash.unsupported(AttentionInputs(x, x, x), Visibility(prefix=prefix)):
        return length
    return length + -length % splash.block_size(length)


def _ascend(queries: tuple[int, ...], count: int, stop: int) -> bool:
    """Return whether there are `count` queries, each after the one before it, in 0..stop-1."""
    edges = (-1, *queries, stop)
    return len(queries) == count and all(a < b for a, b in itertools.pairwise(edges))


def _by_position(x: Array) -> Array:
    """Return x [B, T, H, K] sharded by positions, if the mesh has an axis for positions.

    Between attention and the products around it, the sharding then changes from heads to positions.
    By itself XLA shards those products by heads, and gathers all positions of their inputs.
    """
    return constrain(x, "B L H size") if num_parts("L") > 1 else x
