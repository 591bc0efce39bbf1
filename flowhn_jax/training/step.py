"""One training step: gradients of the mean loss into the optimizer; skipped if not finite."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flowhn_jax.checkpoints.optimizer import learning_rate_schedule, make_optimizer
from flowhn_jax.checkpoints.state import TrainState, abstract_state, state_shardings
from flowhn_jax.config import Config
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch, loss_sum, target_weights
from flowhn_jax.parallel.mesh import batch_sharding, replicated

Metrics = dict[str, jax.Array]


def _accumulated(
    loss_and_gradients: Callable[[Params, Batch], tuple[jax.Array, Params]],
    params: Params,
    batch: Batch,
    parts: int,
) -> tuple[jax.Array, Params]:
    """Return the sums of loss and gradients over `parts` parts of the batch, one after another."""

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss_and_gradients(params, part)), None

    # Part i takes rows i, i + parts, ...: every device then holds rows of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, zeros, split)[0]


def _averaged(decay: float, average: Params, params: Params, count: jax.Array) -> Params:
    """Return the mean of the parameters after each update, whose weights decay with their age.

    Args:
      decay: the decay of the weights per update.
      average: the mean after `count - 1` updates; after none its values do not matter.
      params: after the newest update.
      count: int32, number of updates.
    """
    # The newest weight, 1 - decay, as a share of the sum of all, 1 - decay ** count.
    log_decay = math.log(decay)
    share = math.expm1(log_decay) / jnp.expm1(count * jnp.float32(log_decay))
    return jax.tree.map(lambda new, old: share * new + (1 - share) * old, params, average)


def make_train_step(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return the jitted training step: state and batch -> next state and metrics.

    The state is donated, and the next one has the same shardings. If the loss or the gradient norm
    is not finite, parameters, their average and the optimizer's state do not change, and the step
    counts as skipped.

    Metrics are scalars: loss (nats per target, z-loss included), grad_norm (before clipping) and
    learning_rate in float32; skipped and skipped_in_row of the next state in int32.
    """
    train = config.train
    optimizer = make_optimizer(train)
    schedule = learning_rate_schedule(train)
    summed = partial(loss_sum, config.model, remat=train.remat, z_loss=train.z_loss)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The targets of the whole batch: parts may differ in padding.
        targets = jnp.maximum(target_weights(batch).sum(), 1)
        loss_and_gradients = jax.value_and_grad(partial(summed, divisor=targets))
        if train.accumulate == 1:
            loss, gradients = loss_and_gradients(state.params, batch)
        else:
            loss, gradients = _accumulated(
                loss_and_gradients, state.params, batch, train.accumulate
            )
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        average = state.ema
        if average is not None:
            updates_done = state.step - state.skipped + 1
            average = _averaged(train.ema, average, params, updates_done)
        params, opt_state, average = jax.tree.map(
            partial(jnp.where, finite),
            (params, opt_state, average),
            (state.params, state.opt_state, state.ema),
        )
        skipped = state.skipped + ~finite
        in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The schedule follows the optimizer's count, which leaves skipped steps out.
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": skipped,
            "skipped_in_row": in_row,
        }
        after = TrainState(state.step + 1, params, opt_state, skipped, in_row, average)
        return after, metrics

    # With debug_nans JAX repeats the step, operation by operation, to find the one at fault.
    donated = () if train.debug_nans else (0,)
    out_shardings = state_shardings(config, mesh), replicated(mesh)
    return jax.jit(
        train_step,
        donate_argnums=donated,
        out_shardings=out_shardings,
        compiler_options=compiler_options(mesh, out_shardings[0].params),
    )


def compiler_options(mesh: Mesh, params: Any) -> dict[str, Any] | None:
    """Return XLA's options for a step whose parameters have these shardings.

    On CPUs with AVX-512 XLA would use vectors of 256 bits, which makes the exponentials of a
    selective scan slower than vectors of 512 bits. Other CPUs are not affected.

    On TPUs XLA multiplies each part of a sharded weight as it arrives, and adds it to the product,
    which it reads and writes each time. For the gathered weights of a step that costs more than
    the wait: communication overlaps with other products in any case.
    """
    platform = mesh.devices.flat[0].platform
    is_sharded = not all(each.is_fully_replicated for each in jax.tree.leaves(params))
    if platform == "cpu":
        return {"xla_cpu_prefer_vector_width": 512}
    if platform == "tpu" and is_sharded:
        return {"xla_tpu_enable_windowed_einsum_for_all_gather": False}
    return None


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Return a step's batch as jax.ShapeDtypeStructs with shardings."""
    shape = config.train.batch_size, config.model.context + 1
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return {"tokens": rows, "segment_ids": rows}


def lower_train_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Return the lowered step for a mesh, whose devices need not be available locally."""
    arguments = abstract_state(config, mesh), abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        return make_train_step(config, mesh).lower(*arguments)
