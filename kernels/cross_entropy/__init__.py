"""Output head and cross-entropy in one operation."""

from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import Array

from kernels.backends import Backend, Operation, target_platform
from kernels.checks import check_arguments
from kernels.cross_entropy import chunks, triton, xla
from kernels.manual_axes import vary_alike
from kernels.partition import over_mesh
from kernels.triton_call import for_target

# Bytes of a chunk's logits in float32. Each chunk adds to the head's gradient, a pass over D x V
# numbers; on an accelerator the products take longer than it from about 2000 tokens per chunk.
_CHUNK_BYTES = {"cpu": 128 * 2**20, "gpu": 512 * 2**20, "tpu": 512 * 2**20}

Axes = tuple[str, ...]  # names of mesh axes


def _triton_products() -> chunks.Products:
    return triton.products(for_target(triton.call_triton))


# A backend's function returns its `chunks.Products`.
OPERATION = Operation(
    "cross_entropy",
    {
        "triton": Backend(_triton_products, ("gpu",), triton.unsupported),
        "xla": Backend(lambda: xla.PRODUCTS),
    },
    {"gpu": ("triton", "xla"), "tpu": ("xla",), "cpu": ("xla",)},
)


def cross_entropy(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    reduction: Literal["sum", "none"] = "sum",
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Array:
    """Return the weighted cross-entropy, in nats, of logits `hidden @ head`, chunk by chunk.

    The logits of all tokens never exist at the same time. The loss of token n is
    `weights[n] * (lse - logits[n, targets[n]] + z_loss * lse**2)` with
    `lse = logsumexp(logits[n])`. The last term (PaLM, arXiv 2204.02311, section 5) keeps lse, which
    the others do not determine, near zero.

    Args:
      hidden: [N, D] or [B, T, D], float; its dtype is that of the matrix products. N below stands
        for both; the sharding of sequences and positions, or of tokens, is kept.
      head: [D, V], float; cast to hidden's dtype for the products, which accumulate in float32.
      targets: [N], integer, in 0..V-1. Where the weight is zero any value is valid; elsewhere a
        target out of range makes the loss NaN.
      weights: [N], float32; None: all one. Tokens of weight zero affect neither loss nor gradients.
      reduction: 'sum' for the sum over the tokens, 'none' for the loss of each token. 'sum' is for
        training: it computes the gradients together with the loss, from logits computed once;
        'none' recomputes the logits in the backward pass.
      z_loss: weight of lse**2, at least 0.
      chunk_size: maximal number of tokens per device whose logits exist at the same time; None: as
        many as fill 128 MiB in float32 on a CPU, 512 MiB on an accelerator.
      backend: 'triton' (NVIDIA) or 'xla'; None: see `kernels.backends`.

    Returns:
      A float32 scalar for 'sum', [N] float32 for 'none'. Differentiable in hidden, head (its
      gradient accumulates in float32) and weights (whose gradient is the token's own loss).

    Raises:
      ValueError: a dtype or an option is not as above, an array is empty, shapes do not match each
        other, or `backend` cannot run them.
    """
    rank = len(getattr(hidden, "shape", ()))
    if rank not in (2, 3):
        found = f"shape {hidden.shape}" if hasattr(hidden, "shape") else type(hidden).__name__
        raise ValueError(f"cross_entropy: hidden must be [N, D] or [B, T, D]; got {found}")
    tokens = "N" if rank == 2 else "B T"
    vocabulary = check_arguments(
        "cross_entropy",
        {"hidden": hidden, "head": head, "targets": targets, "weights": weights},
        (f"{tokens} D", "D V", tokens, tokens),
        optional=("weights",),
        integers=("targets",),
        may_be_empty=tokens.split(),  # their loss is 0
    )["V"]
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    if reduction not in ("sum", "none"):
        raise ValueError(f"cross_entropy: reduction must be 'sum' or 'none'; got {reduction!r}")
    if z_loss < 0:
        raise ValueError(f"cross_entropy: z_loss must be at least 0; got {z_loss}")
    if chunk_size is None:
        chunk_size = max(1, _CHUNK_BYTES[target_platform()] // (4 * vocabulary))
    if chunk_size < 1:
        raise ValueError(f"cross_entropy: chunk_size must be at least 1; got {chunk_size}")

    in_range = (targets >= 0) & (targets < vocabulary)
    weights = jnp.where(in_range | (weights == 0), weights, jnp.nan)
    products = OPERATION.choose(hidden, head, backend=backend)()
    local = partial(_on_device, products, reduction, z_loss, chunk_size)
    tokens = tokens.replace("T", "stream")
    layouts = f"{tokens} D", "shard V", tokens, tokens
    out = "" if reduction == "sum" else tokens
    axes_of = "V", "shard", *tokens.split()
    return over_mesh(local, layouts, out, axes_of=axes_of)(hidden, head, targets, weights)


def _on_device(
    products: chunks.Products,
    reduction: str,
    z_loss: float,
    chunk_size: int,
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    vocabulary_axes: Axes,
    shard_axes: Axes,
    *token_axes: Axes,
) -> Array:
    """Return the weighted losses of this device's tokens or, for 'sum', their sum over all devices.

    The mesh axes are those that the vocabulary, the head's D and the tokens are sharded over.
    """
    tokens = targets.size
    count = max(1, -(-tokens // chunk_size))
    hidden, head, targets, weights = vary_alike((hidden, head, targets, weights))

    def flat(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[weights.ndim :])
        return jnp.pad(x, ((0, -tokens % count), *((0, 0),) * (x.ndim - 1)))

    axes = vocabulary_axes, shard_axes, sum(token_axes, ())
    options = chunks.Options(products, count, z_loss, *axes)
    if reduction == "sum":
        return chunks.weighted_sum(options, flat(hidden), head, flat(targets), flat(weights))
    head = chunks.gather_head(head, shard_axes)
    losses = chunks.token_losses(options, flat(hidden), head, flat(targets))
    return weights * losses[:tokens].reshape(weights.shape)
