"""The optimizer of a run, and its learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flowhn_jax import models
from flowhn_jax.config import TrainConfig
from flowhn_jax.models import Params

# Gives an orthogonalized update the size of AdamW's (arXiv 2502.16982, section 2.2).
_MUON_SIZE = 0.2


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done.

    It rises linearly in the warm-up, and then follows `train.schedule`: 'cosine' and 'linear' fall
    until the last step, 'wsd' is constant and falls linearly in the cooldown, and 'constant' stays.
    """
    steps, peak = config.steps, config.learning_rate
    warmup = round(config.warmup * steps)
    first, final = peak / max(warmup, 1), peak * config.final_learning_rate
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=max(steps, warmup + 1),
            end_value=final,
        )
    rising, constant = optax.linear_schedule(first, peak, warmup), optax.constant_schedule(peak)
    if config.schedule == "constant":
        return optax.join_schedules([rising, constant], [warmup])
    falls_from = warmup
    if config.schedule == "wsd":
        falls_from = max(warmup, steps - round(config.cooldown * steps))
    falling = optax.linear_schedule(peak, final, max(steps - falls_from, 1))
    return optax.join_schedules([rising, constant, falling], [warmup, falls_from])


def decay_mask(params: Params) -> Any:
    """Return True for kernels and embeddings, False for norms, biases, A, D and convolutions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: models.is_matrix(path), params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the optimizer that `train.optimizer` names, with clipping of the global gradient norm.

    The means of gradients are stored in `config.moment_dtype`, and updated in float32: optax alone
    would multiply them by beta1 rounded to that dtype, 0.8984 for 0.9 in bfloat16.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    optimizer = {"adamw": _adamw, "muon": _muon}[config.optimizer](config)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(updates, _with_float32_means(state), params)

    return optax.chain(clip, optax.GradientTransformation(optimizer.init, update))


def _adamw(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW (arXiv 1711.05101), with weight decay on matrices only."""
    return optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mask=decay_mask,
        **_shared(config),
    )


def _muon(config: TrainConfig) -> optax.GradientTransformation:
    """Return Muon for the matrices between embedding and head, and AdamW for everything else."""
    muon = optax.contrib.muon(
        learning_rate_schedule(config),
        **_shared(config),
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=_MUON_SIZE,
    )

    def names(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if models.is_hidden_matrix(path) else "adamw", params
        )

    return optax.partition({"muon": muon, "adamw": _adamw(config)}, names)


def _shared(config: TrainConfig) -> dict[str, Any]:
    """Return the keyword arguments that AdamW and Muon share."""
    return {"weight_decay": config.weight_decay, "mu_dtype": config.moment_dtype}


def _matrices(kernels: Any) -> Any:
    """Return which dimensions of each kernel are those of a matrix.

    The first one holds the inputs and the last one the outputs. One between them, as in Mamba-1's
    in_proj [D, 2, E], counts matrices, which are orthogonalized one by one.
    """
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(0, -1), kernels)


def _with_float32_means(state: Any) -> Any:
    """Return an optimizer's state with its means of gradients (`mu`) in float32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_mean = any(getattr(part, "name", None) == "mu" for part in path)
        return leaf.astype(jnp.float32) if is_mean else leaf

    return jax.tree_util.tree_map_with_path(cast, state)
