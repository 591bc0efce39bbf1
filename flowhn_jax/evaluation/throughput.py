"""Speed of a model on this machine: the train step and the forward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flowhn_jax import flops, models
from flowhn_jax.config import Config
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.mesh import batch_sharding
from flowhn_jax.timing import time_repeats
from flowhn_jax.training.state import init_state
from flowhn_jax.training.step import make_train_step
from kernels import backends

Result = dict[str, Any]


def random_batch(config: Config, mesh: Mesh) -> Batch:
    """Windows of random tokens, one document each."""
    train, model = config.train, config.model
    shape = (train.batch_size, model.context + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones(shape, np.int32)}
    return jax.device_put(batch, batch_sharding(mesh))


def peak_memory(device: jax.Device) -> int | None:
    """Most bytes that were in use on the device since the process began; None on a CPU."""
    stats = device.memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def _summary(
    name: str,
    seconds: list[float],
    config: Config,
    mesh: Mesh,
    count_flops: Callable[..., int],
) -> Result:
    """Median speed over the repeats, and their spread; `count_flops` is one of flops.py's."""
    tokens = config.train.batch_size * config.model.context
    median = statistics.median(seconds)
    per_device, dense_per_device = (
        config.train.batch_size
        * count_flops(config.model, config.model.context, causal=causal)
        / median
        / mesh.size
        for causal in (True, False)
    )
    device = mesh.devices.flat[0]
    return {
        f"{name}_tokens_per_second": tokens / median,
        f"{name}_seconds": median,
        f"{name}_seconds_min": min(seconds),
        f"{name}_seconds_max": max(seconds),
        f"{name}_tflops_per_second_per_device": per_device / 1e12,
        f"{name}_mfu": flops.utilisation(per_device, device),
        f"{name}_mfu_palm": flops.utilisation(dense_per_device, device),
    }


def measure(config: Config, mesh: Mesh, repeats: int) -> Result:
    """Times `repeats` train steps and forward passes of the config's batch on random tokens.

    The forward pass ends in float32 logits [B, N, V], as `models.forward` gives them. The compile
    time and the peak of memory are the train step's.
    """
    model = config.model
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        batch = random_batch(config, mesh)
        state = init_state(config, mesh)

        start = time.perf_counter()
        with backends.record() as chosen:
            train_step = make_train_step(config, mesh).lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start

        def step() -> Any:
            nonlocal state
            state, metrics = train_step(state, batch)
            return metrics

        train_seconds = time_repeats(step, repeats)
        memory = peak_memory(mesh.devices.flat[0])

        forward = jax.jit(lambda params, tokens: models.forward(model, params, tokens))
        tokens = batch["tokens"][:, :-1]
        forward_seconds = time_repeats(lambda: forward(state.params, tokens), repeats)

    context = model.context
    return {
        "strategy": model.split.strategy,
        "parameters": models.param_count(model),
        "batch_size": config.train.batch_size,
        "context": context,
        "dtype": str(models.compute_dtype(model)),
        "kernels": backends.describe(chosen),
        "repeats": repeats,
        **_summary("train", train_seconds, config, mesh, flops.train_flops),
        **_summary("forward", forward_seconds, config, mesh, flops.forward_flops),
        "compile_seconds": compile_seconds,
        "train_peak_memory_bytes": memory,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
