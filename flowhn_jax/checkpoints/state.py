"""The train state, a plain pytree."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flowhn_jax import models
from flowhn_jax.checkpoints.optimizer import make_optimizer
from flowhn_jax.config import Config
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
    ema: Params | None = None  # float32: average of the parameters, with train.ema


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
    average = jax.tree.map(jnp.copy, params) if config.train.ema else None
    opt_state = make_optimizer(config.train).init(params)
    return TrainState(zero, params, opt_state, zero, zero, average)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Return a new state from the config's seed; its values do not depend on the mesh."""
    return make_init(config, mesh)(jax.random.key(config.train.seed))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the state as jax.ShapeDtypeStructs with shardings."""
    params = models.abstract_params(config.model)
    opt_state = jax.eval_shape(make_optimizer(config.train).init, params)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    average = params if config.train.ema else None
    state = TrainState(count, params, opt_state, count, count, average)
    return with_shardings(state, mesh)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """Return the shardings of the state, as a TrainState of them."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
