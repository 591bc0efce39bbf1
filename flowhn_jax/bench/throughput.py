"""Speed of a model on this machine: train step and, for models with caches, prefill and decode."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from flowhn_jax import flops, models
from flowhn_jax.checkpoints.state import TrainState, abstract_state
from flowhn_jax.config import Config, ModelConfig
from flowhn_jax.models import Params
from flowhn_jax.models.loss import Batch
from flowhn_jax.parallel.mesh import batch_sharding
from flowhn_jax.training.step import Metrics, lower_train_step
from flowhn_jax.utils.timing import compile_timed, time_repeats
from kernels import backends

Result = dict[str, Any]
_POSITIONS = 32  # at which a decode step is timed

Seconds = dict[str, list[float]]  # of each repeat, by the name of what is timed


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled train step of a config on a mesh; holds no arrays.

    Attributes:
      config: the config of the run.
      mesh: the mesh that the step is compiled for.
      train_step: (state, batch) -> (new state, metrics); the state is donated.
      compile_seconds: the time of tracing and compiling.
      memory_bytes: per device: arguments, results and temporaries according to XLA.
      kernels: backends that the step uses.
    """

    config: Config
    mesh: Mesh
    train_step: jax.stages.Compiled
    compile_seconds: float
    memory_bytes: int
    kernels: str


def compile_programs(config: Config, mesh: Mesh) -> Programs:
    """Compile the train step; safe to call from several threads at the same time."""
    with backends.use(config.kernels.backend):
        start = time.perf_counter()
        with backends.record() as chosen:
            lowered = lower_train_step(config, mesh)
        seconds = time.perf_counter() - start
        train_step, compiling = compile_timed(lowered)
    return Programs(
        config,
        mesh,
        train_step,
        compile_seconds=seconds + compiling,
        memory_bytes=program_bytes(train_step),
        kernels=backends.describe(chosen),
    )


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes per device that a program needs: arguments, results and temporaries."""
    sizes = memory_sizes(compiled)
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def memory_sizes(compiled: jax.stages.Compiled) -> Any:
    """Return XLA's sizes of a program's memory, jaxlib's CompiledMemoryStats."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise RuntimeError("this backend of XLA does not report the memory of its programs")
    return sizes


class TrainRun:
    """Train steps of compiled programs on one random batch; a call runs the next step."""

    def __init__(self, programs: Programs):
        """Make the arrays; they are freed with this object."""
        config, mesh = programs.config, programs.mesh
        self._train_step = programs.train_step
        with jax.set_mesh(mesh):
            self._batch = random_batch(config, mesh)
            self.state = random_state(config, mesh)

    def __call__(self) -> Metrics:
        """Run a step and return its metrics."""
        self.state, metrics = self._train_step(self.state, self._batch)
        return metrics


def time_programs(programs: Programs, repeats: int) -> Seconds:
    """Return the seconds of train steps, prefills and decode steps on random tokens.

    The arrays exist only during this call.
    """
    seconds, params = time_training(programs, repeats)
    return {"train": seconds} | time_inference(programs.config, programs.mesh, params, repeats)


def time_training(programs: Programs, repeats: int) -> tuple[list[float], Params]:
    """Return the seconds of each of `repeats` train steps, and the parameters after them."""
    run = TrainRun(programs)
    return time_repeats(run, repeats), run.state.params


def time_inference(config: Config, mesh: Mesh, params: Params, repeats: int) -> Seconds:
    """Return the seconds of prefills and decode steps of the batch and of one sequence.

    A prefill fills the caches with a context of each sequence and returns the logits of the next
    token: for one sequence that is the time to the first token. A decode step returns the logits of
    one token per sequence, all at the same position. Empty for a model without caches.
    """
    model = config.model
    if not models.can_decode(model):
        return {}
    seconds: Seconds = {}
    with jax.set_mesh(mesh), backends.use(config.kernels.backend):
        params = models.for_inference(model, params)
        tokens = random_batch(config, mesh)["tokens"][:, :-1]
        for end, count in sequences(config).items():
            of_batch = tokens[:count]
            seconds[f"prefill{end}"] = time_repeats(
                lambda of_batch=of_batch: models.prefill(model, params, of_batch)[0], repeats
            )
            seconds[f"decode{end}"] = _time_decode(model, params, of_batch, repeats)
    return seconds


def sequences(config: Config) -> dict[str, int]:
    """Return the number of sequences of prefills and decode steps, by the suffix of their names."""
    return {"": config.train.batch_size, "_one": 1}


def _time_decode(
    model: ModelConfig, params: Params, tokens: jax.Array, repeats: int
) -> list[float]:
    """Return the seconds of a step, each the mean over positions from all parts of the context.

    In a split model the position determines which branch runs, and so the time of a step.
    """
    batch, length = tokens.shape
    edges = np.linspace(0, length, _POSITIONS + 1).astype(int)
    positions = np.random.default_rng(0).integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
    # One array per position, because a step donates its cache.
    at = [np.full(batch, position, np.int32) for position in positions]
    last = tokens[:, 0]
    cache = models.init_cache(model, params, batch, length)

    def decode() -> jax.Array:
        nonlocal cache
        for position in at:
            logits, cache = models.step(model, params, last, cache._replace(tokens=position))
        return logits

    return [seconds / len(at) for seconds in time_repeats(decode, repeats)]


def random_state(config: Config, mesh: Mesh) -> TrainState:
    """Return a state of normal parameters of standard deviation 0.02, for timing.

    The models' own initialization is one program per model that takes as long to compile as a train
    step; here it is one small program per shape.
    """
    state = abstract_state(config, mesh)
    params = jax.tree.map(lambda x: _normal(x.shape, x.dtype, x.sharding), state.params)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), state)
    return dataclasses.replace(state, params=params)


def _normal(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    return _normal_maker(shape, dtype, sharding)(jax.random.key(math.prod(shape)))


@functools.lru_cache(maxsize=1024)
def _normal_maker(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    def make(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    return jax.jit(make, out_shardings=sharding)


def random_batch(config: Config, mesh: Mesh) -> Batch:
    """Return a batch [B, T + 1] of windows of random tokens, each a single document."""
    train, model = config.train, config.model
    shape = (train.batch_size, model.context + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape, np.int32)
    batch = {"tokens": tokens, "segment_ids": np.ones(shape, np.int32)}
    return jax.device_put(batch, batch_sharding(mesh))


def tokens_of(name: str, config: Config) -> int:
    """Return the tokens of one timed call: whole contexts, or one per sequence in a decode step."""
    kind, _, end = name.partition("_")
    count = sequences(config)[f"_{end}" if end else ""]
    return count * (1 if kind == "decode" else config.model.context)


def work_rate(name: str, seconds: float, config: Config, mesh: Mesh) -> Result:
    """Return TFLOP/s per device of a timed train step or prefill, and its share of the peak."""
    count = flops.train_flops if name == "train" else flops.prefill_flops
    length = config.model.context
    per_device, dense_per_device = (
        tokens_of(name, config)
        / length
        * count(config.model, length, causal=causal)
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


def _bandwidth(name: str, seconds: float, config: Config, mesh: Mesh) -> Result:
    """Return GB/s per device that a decode step must move, and its share of the memory's peak."""
    moved = flops.decode_bytes(config.model, tokens_of(name, config), config.model.context)
    per_device = moved / seconds / mesh.size
    peak = flops.peak_bandwidth(mesh.devices.flat[0])
    return {
        f"{name}_gigabytes_per_second_per_device": per_device / 1e9,
        f"{name}_bandwidth_utilisation": None if peak is None else per_device / peak,
    }


def summary(name: str, seconds: list[float], config: Config, mesh: Mesh) -> Result:
    """Return tokens/s and seconds of a timed program: the median and the spread of the repeats."""
    median = statistics.median(seconds)
    rate = _bandwidth if name.startswith("decode") else work_rate
    return {
        f"{name}_tokens_per_second": tokens_of(name, config) / median,
        f"{name}_seconds": median,
        f"{name}_seconds_min": min(seconds),
        f"{name}_seconds_max": max(seconds),
        **rate(name, median, config, mesh),
    }


def measure(config: Config, mesh: Mesh, *, repeats: int = 10) -> Result:
    """Compile and time a config's programs, and return all figures; see `time_programs`."""
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
        result |= summary(name, each, config, mesh)
    if "prefill_one" in seconds:
        result["time_to_first_token"] = result["prefill_one_seconds"]
    return result | {
        "compile_seconds": programs.compile_seconds,
        "train_memory_bytes": programs.memory_bytes,
        "device": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
    }
