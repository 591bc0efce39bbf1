"""Next-token loss of a batch of packed windows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flowhn_jax import models
from flowhn_jax.config import ModelConfig
from flowhn_jax.data.packing import target_mask
from flowhn_jax.models import Params
from kernels.cross_entropy import cross_entropy

# tokens and segment_ids, both [B, N + 1] int32; weights [B, N] float32 where not all count
Batch = dict[str, jax.Array]


class LossSum(NamedTuple):
    """Summed negative log-likelihood in nats, with the z-loss, and the sum of targets' weights."""

    nll: jax.Array  # float32 scalar
    targets: jax.Array  # float32 scalar


def target_weights(batch: Batch) -> jax.Array:
    """[B, N] float32: the batch's weights, else 1 for each token and 0 for padding (segment 0)."""
    if "weights" in batch:
        return batch["weights"]
    return target_mask(batch["segment_ids"]).astype(jnp.float32)


def token_losses(config: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """-log p(next token) in nats times its weight, [B, N] float32."""
    hidden, head = _hidden_and_head(config, params, batch, "none")
    targets, weights = batch["tokens"][:, 1:], target_weights(batch)
    return cross_entropy(hidden, head, targets, weights, reduction="none")


def loss_sum(
    config: ModelConfig,
    params: Params,
    batch: Batch,
    *,
    remat: str = "none",
    z_loss: float = 0.0,
) -> LossSum:
    """Sum of -log p(next token), and of the z-loss, over the batch's targets, times their weights.

    The last token of a document is scored on predicting the next one's first, the end-of-text
    token: that is how the model learns where documents end.
    """
    hidden, head = _hidden_and_head(config, params, batch, remat)
    targets, weights = batch["tokens"][:, 1:], target_weights(batch)
    nll = cross_entropy(hidden, head, targets, weights, z_loss=z_loss)
    return LossSum(nll, weights.sum())


def _hidden_and_head(
    config: ModelConfig, params: Params, batch: Batch, remat: str
) -> tuple[jax.Array, jax.Array]:
    model = models.bind(config, params)
    hidden = model(batch["tokens"][:, :-1], batch["segment_ids"][:, :-1], remat=remat)
    return hidden, model.head.kernel[...]
