"""Next-token loss of a batch of packed windows."""

from typing import Any

import jax
import jax.numpy as jnp

from flowhn_jax import models
from flowhn_jax.data.packing import target_mask
from flowhn_jax.models import ModelConfig, Params
from kernels.cross_entropy import cross_entropy

# tokens and segment_ids, [B, N + 1] int32; optionally weights of the targets, [B, N] float32.
Batch = dict[str, jax.Array]


def target_weights(batch: Batch) -> jax.Array:
    """Return the weights of the targets, [B, N] float32.

    They are the batch's weights, otherwise 1 for each token and 0 for padding (segment 0).
    """
    if "weights" in batch:
        return batch["weights"]
    segment_ids: Any = batch["segment_ids"]
    return jnp.asarray(target_mask(segment_ids), jnp.float32)


def token_losses(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Return -log p(next token) in nats times its weight, [B, N] float32."""
    model = models.bind(config, params)
    hidden = model(batch["tokens"][:, :-1], batch["segment_ids"][:, :-1])
    targets, weights = batch["tokens"][:, 1:], target_weights(batch)
    return cross_entropy(hidden, model.head_kernel(), targets, weights, reduction="none")


def loss_sum(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    remat: str = "none",
    z_loss: float = 0.0,
    divisor: jax.Array | float = 1.0,
) -> jax.Array:
    """Return the weighted sum of -log p(next token) over the batch's targets, a float32 scalar.

    The target of a document's last text token is the end-of-text token: that is how the model
    learns where documents end.

    Args:
      config: a config of any family.
      params: from `models.init`.
      batch: a batch of packed windows.
      remat: what the backward pass keeps, as for `LanguageModel`.
      z_loss: weight of the squared log-normalizer (arXiv 2204.02311, section 5), which is added.
      divisor: the divisor of the sum, for a mean.
    """
    model = models.bind(config, params)
    hidden = model(batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], remat=remat)
    targets, weights = batch["tokens"][:, 1:], target_weights(batch)
    nll = cross_entropy(hidden, model.head_kernel(), targets, weights, z_loss=z_loss)
    return nll / divisor
