"""Part `kernel_speed`: operations against their floors and peers, models against the authors'."""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from flowhn_jax import models
from flowhn_jax.bench import authors
from flowhn_jax.bench.attempt import Row, attempt
from flowhn_jax.bench.authors_model import describe_kernels
from flowhn_jax.bench.cases import OPERATION_NAMES, cases
from flowhn_jax.bench.device import measure_rates
from flowhn_jax.bench.kernel_times import measurements
from flowhn_jax.bench.suite.workload import (
    Earlier,
    compile_pool,
    dtypes,
    recipe,
    sizes,
    trained_at,
)
from flowhn_jax.bench.throughput import Programs, TrainRun, compile_programs
from flowhn_jax.config import Config, ModelConfig
from flowhn_jax.parallel.mesh import make_mesh
from flowhn_jax.utils.timing import time_once

_AUTHORS = "authors"
# The authors' modes (interop.reference.MODES) of the strategies that do the same work.
_MODES = {"ae_split": "B", "no_split": "A"}
_ROUNDS = 3


def plan() -> list[str]:
    """Return OPERATION/SIZE/LENGTH for the kernels and authors/SIZE/STRATEGY for models."""
    is_cpu = jax.default_backend() == "cpu"
    first, *others = [("135m", 256)] if is_cpu else [("135m", 1024), ("1b", 1024), ("135m", 8192)]
    strategies = list(_MODES)[:1] if is_cpu else _MODES
    of_authors = [f"{_AUTHORS}/{sizes()[0]}/{strategy}" for strategy in strategies]
    return [*_of(*first), *of_authors, *(key for shape in others for key in _of(*shape))]


def _of(size: str, length: int) -> list[str]:
    return [f"{operation}/{size}/{length}" for operation in OPERATION_NAMES]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield a row for each key; those of kernels have `measurements`, one per backend and peer."""
    for key in missing:
        first, *rest = key.split("/")
        if first == _AUTHORS:
            yield attempt({"key": key}, functools.partial(_against_authors, *rest, earlier))
        else:
            yield from _kernels(key, first, rest[0], int(rest[1]))


def _kernels(key: str, operation: str, size: str, length: int) -> Iterator[Row]:
    dtype = dtypes()[0]
    rates = measure_rates(dtype)
    tokens, repeats = (length, 3) if jax.default_backend() == "cpu" else (32768, 5)
    rows: list[Row] = []
    for case in cases([operation], [size], [length], tokens, dtype):
        for measurement in measurements(case, (), rates, repeats, with_peers=True):
            rows.append(measurement())
            yield {"key": key, "measurements": rows, "partial": True}
    yield {"key": key, "measurements": rows}


def _against_authors(size: str, strategy: str, earlier: Earlier) -> Row:
    """Time a block and a train step, ours and the authors' in PyTorch, alternating.

    At the recipe's batch; on a CPU at that of part `training`, whose program is compiled already.
    """
    config = recipe(size, strategy)
    if jax.default_backend() == "cpu":
        config = trained_at(config, f"{size}/{strategy}", earlier)
    dtype, model, batch = dtypes()[0], config.model, config.train.batch_size
    mode, length = _MODES[strategy], model.context
    with compile_pool() as pool:  # XLA compiles while PyTorch is imported
        block = pool.submit(block_run, model, batch, length)
        programs = pool.submit(_compile, config)
        their_block = authors.block_runs(model, mode, batch, length, dtype)[1]
        their_step = authors.train_step(config, mode)
    row: Row = {
        "strategy": strategy,
        "size": size,
        "batch_size": batch,
        "context": length,
        "dtype": dtype,
        "authors_kernels": describe_kernels(),
    }
    row["block"] = alternating((block.result(), their_block))
    row["train step"] = alternating((TrainRun(programs.result()), their_step))
    return row


def _compile(config: Config) -> Programs:
    return compile_programs(config, make_mesh(config.mesh, config.train.batch_size))


def alternating(pair: tuple[Callable[[], Any], Callable[[], Any]]) -> Row:
    """Return the medians of two functions, timed alternately, and the median of their ratios.

    Both are called once before, to warm up.
    """
    for run in pair:
        jax.block_until_ready(run())
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(_ROUNDS):
        for run, each in zip(pair, seconds, strict=True):
            each.append(time_once(run))
    ours, theirs = map(statistics.median, seconds)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return {"seconds": ours, "authors_seconds": theirs, "ratio": statistics.median(ratios)}


def block_run(model: ModelConfig, batch: int, length: int) -> Callable[[], Any]:
    """Return forward and backward of block 0 on random inputs [batch, length, D], compiled."""
    block, plan = models.build(model).blocks[0], model.plan(length).blocks[0]
    graph, params = nnx.split(block)
    shape, dtype = (batch, length, model.width), models.compute_dtype(model)
    x, dy = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0)))

    def with_gradients(params: Any, x: jax.Array, dy: jax.Array) -> Any:
        def run(params: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params)(x, plan=plan)

        return jax.vjp(run, params, x)[1](dy)

    compiled = jax.jit(with_gradients).lower(params, x, dy).compile()
    return lambda: compiled(params, x, dy)


def ratios(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Yield a label and the times of each comparison with the authors' code among the rows."""
    for row in rows:
        for name in ("block", "train step"):
            if name in row:
                yield f"{name} of {row['strategy']} at {row['size']}", row[name]
