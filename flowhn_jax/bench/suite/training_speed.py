"""Part `training`: tokens per second of every model, at the largest batch that fits.

All models of a size and family are compiled first, in several threads; then they are timed
round-robin, so that a drift of the machine affects all of them equally.
"""

import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from absl import logging

from flowhn_jax import flops, models
from flowhn_jax.aot.roofline.bound import bound
from flowhn_jax.aot.roofline.rates import of_device
from flowhn_jax.bench.attempt import Row, attempt, failure
from flowhn_jax.bench.device import measure_rates
from flowhn_jax.bench.largest_batch import Attempt, NoBatchFitsError, largest_batch
from flowhn_jax.bench.suite.workload import MODELS, Earlier, compile_pool, dtypes, recipe, sizes
from flowhn_jax.bench.throughput import (
    Programs,
    compile_programs,
    memory_sizes,
    time_training,
    tokens_of,
    work_rate,
)
from flowhn_jax.config import BASELINES, Config
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.utils.text import one_line
from kernels.partition import AXES

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device is not a type to the checker

# Once a step takes this long at the device's peak rate, a larger batch does not use it better.
_MAX_STEP_SECONDS = {"cpu": 0.1, "gpu": 0.25, "tpu": 0.25}
_ROUNDS = {"cpu": 2, "gpu": 3, "tpu": 3}
_REPEATS = 2
# Share of the memory: XLA's libraries and fragmentation are not in the compiler's analysis.
_USABLE = 0.94
_MIN_STATE_BYTES = 16  # per parameter: itself, its gradient and AdamW's two moments, float32


class TooLargeError(ValueError):
    """No batch fits; `needed` is a lower bound of the bytes that one would need."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


class Candidate(NamedTuple):
    """A model's train step, compiled at the largest batch that fits."""

    config: Config
    programs: Programs
    limit: str  # what limits the batch: 'memory' or 'step time'
    attempts: int  # programs compiled to find it
    bound_seconds: float | None  # least time of a step; None where it is unknown


def plan() -> list[str]:
    """Return SIZE/MODEL for each size and model; within a size FlowHN's strategies come first."""
    return [f"{size}/{model}" for size in sizes() for model in MODELS]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield a row for each model after each round of its group, and at once if it fails."""
    rate = product_rate(earlier)
    for group in _groups(missing):
        yield from _measure_group(group, memory_limit(), rate)


def product_rate(earlier: Earlier) -> float:
    """Return the FLOP/s of the device's matrix products, as part `machine` measured them.

    It determines the batches, so every process must use the same number.
    """
    dtype = dtypes()[0]
    rows = (row for row in earlier.get("machine", ()) if row["key"] == f"rates/{dtype}")
    measured = next(rows, {}).get("matmul_flops_per_second")
    return measured or measure_rates(dtype).matmul_flops_per_second


def _groups(keys: Sequence[str]) -> list[list[str]]:
    """Return the keys grouped by size and family, in their order."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for key in keys:
        size, _, model = key.partition("/")
        groups.setdefault((size, model in BASELINES), []).append(key)
    return list(groups.values())


def _measure_group(keys: list[str], memory: int, flops_per_second: float) -> Iterator[Row]:
    compiled: dict[str, Candidate] = {}
    with compile_pool() as pool:
        futures = {
            key: pool.submit(compile_largest, recipe(*key.split("/")), memory, flops_per_second)
            for key in keys
        }
        for key, future in futures.items():
            try:
                compiled[key] = future.result()
            except Exception as error:  # no batch fits, or the model does not compile
                yield _labels(key) | {"failed": failure(error)}
            else:
                yield _labels(key) | _described(compiled[key]) | {"partial": True}
    seconds: dict[str, list[float]] = {key: [] for key in compiled}
    rounds = _ROUNDS[jax.default_backend()]
    for round_ in range(rounds):
        for key in _rotated(list(compiled), round_):
            row = _labels(key) | _described(compiled[key])
            row |= {"partial": True} if round_ + 1 < rounds else {}
            row = attempt(row, functools.partial(_timed, compiled[key], seconds[key]))
            if "failed" in row:
                row.pop("partial", None)  # it is not timed again
                del compiled[key]
            yield row


def _rotated(keys: list[str], by: int) -> list[str]:
    return keys[by:] + keys[:by]


def _labels(key: str) -> Row:
    size, _, model = key.partition("/")
    return {"key": key, "size": size, "model": model}


def _timed(candidate: Candidate, seconds: list[float]) -> Row:
    """Time a round of a model, add its steps to `seconds`, and return the speed of all rounds."""
    config, programs = candidate.config, candidate.programs
    seconds += time_training(programs, _REPEATS)[0]
    median = statistics.median(seconds)
    rate = tokens_of("train", config) / median
    return {
        "step_seconds": median,
        "step_seconds_min": min(seconds),
        "step_seconds_max": max(seconds),
        "steps": len(seconds),
        "tokens_per_second": rate,
        **work_rate("train", median, config, programs.mesh),
        "summary": f"{rate:,.0f} tokens/s",
    }


def _described(candidate: Candidate) -> Row:
    """Return what is known about a model before it runs."""
    config, programs = candidate.config, candidate.programs
    return {
        "parameters": models.param_count(config.model),
        "batch_size": config.train.batch_size,
        "batch_limit": candidate.limit,
        "context": config.model.context,
        "dtype": str(models.compute_dtype(config.model)),
        "kernels": programs.kernels,
        "memory_bytes": programs.memory_bytes,
        "compile_seconds": programs.compile_seconds,
        "bound_seconds": candidate.bound_seconds,
        "programs_compiled": candidate.attempts,
    }


def compile_largest(
    config: Config,
    memory: int,
    flops_per_second: float,
    devices: "Sequence[Device] | None" = None,
) -> Candidate:
    """Return a model's train step at the largest power of two of sequences per device that fits.

    Args:
      config: the recipe; its batch size is replaced.
      memory: bytes per device that a program may use.
      flops_per_second: the rate of the device's matrix products; it limits the time of a step.
      devices: the devices of the mesh, which may be absent hardware; None for all local devices.

    Raises:
      TooLargeError: not even one sequence fits.
    """
    model = config.model
    needed = _MIN_STATE_BYTES * models.param_count(model)
    mesh = make_mesh(config.mesh, 0, devices)  # for any batch
    ways = math.prod(mesh.shape[name] for name in AXES["B"])
    if needed > memory:
        raise TooLargeError(
            f"parameters, gradients and optimizer need {needed / 2**30:.1f} GiB; "
            f"{memory / 2**30:.1f} GiB are available",
            needed,
        )
    sequence_seconds = flops.train_flops(model, model.context) / flops_per_second
    step_seconds = _MAX_STEP_SECONDS[mesh.devices.flat[0].platform]
    most = 2 ** int(math.log2(max(1.0, step_seconds / sequence_seconds)))
    attempts = 0

    def compile_at(each: int) -> Attempt[Programs | None]:
        nonlocal attempts
        attempts += 1
        train = dataclasses.replace(config.train, batch_size=each * ways)
        sized = dataclasses.replace(config, train=train)
        try:
            programs = compile_programs(sized, make_mesh(sized.mesh, each * ways, devices))
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Attempt(None, fits=False)
        temporaries = memory_sizes(programs.train_step).temp_size_in_bytes
        fits = programs.memory_bytes <= memory
        return Attempt(programs, fits, programs.memory_bytes - temporaries, temporaries)

    try:
        programs = largest_batch(compile_at, most, memory, most).result
    except NoBatchFitsError as error:
        raise TooLargeError(str(error), memory) from error
    assert programs is not None  # an attempt that fits has programs
    each = programs.config.train.batch_size // ways
    limit = "step time" if each == most else "memory"
    return Candidate(programs.config, programs, limit, attempts, _bound_seconds(programs))


def _bound_seconds(programs: Programs) -> float | None:
    """Return the least time that the compiled step can take; None on devices of unknown rates.

    Kernels count by their FLOPs and bytes, and collectives take no time.
    """
    config, mesh = programs.config, programs.mesh
    rates = of_device(mesh.devices.flat[0])
    text = None if rates is None else programs.train_step.as_text()
    if rates is None or text is None:
        return None
    step_flops = config.train.batch_size * flops.train_flops(config.model, config.model.context)
    try:
        return bound(text, rates, step_flops / mesh.size).milliseconds / 1e3
    except (ValueError, LookupError) as error:  # the step can be timed without it
        logging.warning("The program's bound is unknown: %s", one_line(error))
        return None


def memory_limit() -> int:
    """Return the bytes per device that a program may use; on a CPU half of the host's memory."""
    device = jax.devices()[0]
    statistics: Any = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(_USABLE * statistics["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
