"""The train state, a plain pytree, and its optimizer."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.config import Config, TrainConfig
from flowhn_jax.models import Params
from flowhn_jax.parallel.rules import with_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes."""

    step: jax.Array  # int32 scalar: steps done
    params: Params  # float32
    opt_state: Any  # of optax, float32; the mean of gradients in train.moment_dtype
    skipped: jax.Array  # int32 scalar: steps that were skipped
    skipped_in_row: jax.Array  # int32 scalar: how many of the last steps were skipped


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Return a linear warm-up, then a cosine decay to the final rate after the last step."""
    warmup = round(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(warmup, 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.learning_rate * config.final_learning_rate,
    )


def decay_mask(params: Params) -> Any:
    """Return True for kernels and embeddings, False for norms, biases, A, D and convolutions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: models.is_matrix(path), params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return AdamW (arXiv 1711.05101) with clipping of the global gradient norm.

    The mean of gradients is stored in `config.moment_dtype`, and updated in float32: optax alone
    would multiply it by beta1 rounded to that dtype, 0.8984 for 0.9 in bfloat16.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.moment_dtype,
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        adam, *others = state
        adam = adam._replace(mu=optax.tree.cast(adam.mu, jnp.float32))
        return adamw.update(updates, (adam, *others), params)

    return optax.chain(clip, optax.GradientTransformation(adamw.init, update))


def make_init(config: Config, mesh: Mesh) -> Callable[[jax.Array], TrainState]:
    """Return the jitted function from a key to a new state, sharded over the mesh."""

    def init(key: jax.Array) -> TrainState:
        return _at_step_zero(config, models.init(config.model, key))

    return jax.jit(init, out_shardings=state_shardings(config, mesh))


def state_of(config: Config, mesh: Mesh, params: Params) -> TrainState:
    """Return a new state with these parameters, which are donated, sharded over the mesh."""
    start = jax.jit(
        partial(_at_step_zero, config),
        donate_argnums=0,
        out_shardings=state_shardings(config, mesh),
    )
    return start(params)


def _at_step_zero(config: Config, params: Params) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, make_optimizer(config.train).init(params), zero, zero)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Return a new state from the config's seed; its values do not depend on the mesh."""
    return make_init(config, mesh)(jax.random.key(config.train.seed))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the state as jax.ShapeDtypeStructs with shardings."""
    params = models.abstract_params(config.model)
    opt_state = jax.eval_shape(make_optimizer(config.train).init, params)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, opt_state, count, count)
    return with_shardings(state, mesh)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Return the shardings of the state, as a TrainState of them."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
