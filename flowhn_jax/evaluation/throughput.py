"""Speed of a model on this machine: train step, prefill and, where there is one, decode step."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowhn_jax import flops, models
from flowhn_jax.config import Config
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.mesh import batch_sharding
from flowhn_jax.timing import time_repeats
from flowhn_jax.training.state import TrainState, make_init
from flowhn_jax.training.step import Metrics, lower_train_step
from kernels import backends

Result = dict[str, Any]
Seconds = dict[str, list[float]]  # of each repeat, by what was timed


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is timed of a config on a mesh, compiled once; no arrays."""

    config: Config
    mesh: Mesh
    init: Callable[[jax.Array], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    compile_seconds: float  # of the train step
    memory_bytes: int  # a device, of the train step: arguments, results and temporaries by XLA
    kernels: str  # that the train step runs on


def compile_programs(config: Config, mesh: Mesh) -> Programs:
    """Compiles the train step."""
    with backends.use(config.kernels.backend):
        start = time.perf_counter()
        with backends.record() as chosen:
            train_step = lower_train_step(config, mesh).compile()
        seconds = time.perf_counter() - start
    sizes = train_step.memory_analysis()
    return Programs(
        config,
        mesh,
        make_init(config, mesh),
        train_step,
        compile_seconds=seconds,
        memory_bytes=sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes,
        kernels=backends.describe(chosen),
    )


def time_programs(programs: Programs, repeats: int) -> Seconds:
    """Times train steps, prefills and decode steps of the config's batch on random tokens.

    A prefill reads a context of each sequence and gives the logits of one token more, a decode step
    those of one token for each sequence of the batch, with caches for a whole context. The arrays
    are made for this and dropped behind it.
    """
    config, mesh = programs.config, programs.mesh
    model, batch_size = config.model, config.train.batch_size
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        batch = random_batch(config, mesh)
        state = programs.init(jax.random.key(config.train.seed))

        def train() -> Metrics:
            nonlocal state
            state, metrics = programs.train_step(state, batch)
            return metrics

        seconds = {"train": time_repeats(train, repeats)}
        params, tokens = state.params, batch["tokens"][:, :-1]
        del state, train  # the optimizer's part of the memory
        if models.can_decode(model):
            seconds["prefill"] = time_repeats(
                lambda: models.prefill(model, params, tokens), repeats
            )
            cache = models.init_cache(model, params, batch_size, model.context)
            last = jnp.asarray(tokens[:, 0])

            def decode() -> jax.Array:
                nonlocal cache
                logits, cache = models.step(model, params, last, cache)
                return logits

            seconds["decode"] = time_repeats(decode, repeats)
    return seconds


def random_batch(config: Config, mesh: Mesh) -> Batch:
    """Windows of random tokens, one document each."""
    train, model = config.train, config.model
    shape = (train.batch_size, model.context + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones(shape, np.int32)}
    return jax.device_put(batch, batch_sharding(mesh))


def tokens_of(name: str, config: Config) -> int:
    """Tokens of one timed call: of a batch of contexts, or one a sequence where it decodes."""
    return config.train.batch_size * (1 if name == "decode" else config.model.context)


def work_rate(name: str, seconds: float, config: Config, mesh: Mesh) -> Result:
    """TFLOP/s a device, and their share of the peak, of a timed 'train' or 'prefill'."""
    count = {"train": flops.train_flops, "prefill": flops.prefill_flops}[name]
    per_device, dense_per_device = (
        config.train.batch_size
        * count(config.model, config.model.context, causal=causal)
        / seconds
        / mesh.size
        for causal in (True, False)
    )
    device = mesh.devices.flat[0]
    return {
        f"{name}_tflops_per_second_per_device": per_device / 1e12,
        f"{name}_mfu": flops.utilisation(per_device, device),
        f"{name}_mfu_palm": flops.utilisation(dense_per_device, device),
    }


def _summary(name: str, seconds: list[float], config: Config, mesh: Mesh) -> Result:
    """Median speed over the repeats, and their spread."""
    median = statistics.median(seconds)
    return {
        f"{name}_tokens_per_second": tokens_of(name, config) / median,
        f"{name}_seconds": median,
        f"{name}_seconds_min": min(seconds),
        f"{name}_seconds_max": max(seconds),
        **({} if name == "decode" else work_rate(name, median, config, mesh)),
    }


def measure(config: Config, mesh: Mesh, repeats: int) -> Result:
    """Times `repeats` calls of each program; see `time_programs`."""
    model = config.model
    programs = compile_programs(config, mesh)
    seconds = time_programs(programs, repeats)
    result = {
        "model": model.name,
        "parameters": models.param_count(model),
        "batch_size": config.train.batch_size,
        "context": model.context,
        "dtype": str(models.compute_dtype(model)),
        "kernels": programs.kernels,
        "repeats": repeats,
    }
    for name, each in seconds.items():
        result |= _summary(name, each, config, mesh)
    return result | {
        "compile_seconds": programs.compile_seconds,
        "train_memory_bytes": programs.memory_bytes,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
