"""Part `learning`: 200 steps on text in bfloat16 and in float32, from the same parameters."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from flowhn_jax.bench.attempt import Row, failure
from flowhn_jax.bench.suite.workload import Earlier, recipe, sizes
from flowhn_jax.bench.throughput import compile_programs
from flowhn_jax.checkpoints.state import init_state
from flowhn_jax.config import Config
from flowhn_jax.data.open import open_data
from flowhn_jax.data.pipeline import train_batches
from flowhn_jax.parallel.mesh import make_mesh, shard_batch

STEPS = 200
_STEPS_PER_ROW = 20


def plan() -> list[str]:
    """Return the dtypes."""
    return ["bfloat16", "float32"]


def measure(missing: list[str], earlier: Earlier) -> Iterator[Row]:
    """Yield a row with `losses`, one per step so far, for every 20 steps of each dtype."""
    for key in missing:
        try:
            yield from _learn(key)
        except Exception as error:
            yield {"key": key, "failed": failure(error)}


def config_of(dtype: str) -> Config:
    """Return FlowHN's default strategy at the first size, on the embedded corpus."""
    config = recipe(sizes()[0], "fac_split")
    model = dataclasses.replace(config.model, dtype=dtype)
    train = dataclasses.replace(config.train, steps=STEPS)
    return dataclasses.replace(config, model=model, train=train)


def _learn(dtype: str) -> Iterator[Row]:
    config = config_of(dtype)
    mesh = make_mesh(config.mesh, config.train.batch_size)
    programs = compile_programs(config, mesh)
    data = open_data(config, str(data_folder()))
    batches = train_batches(data, batch_size=config.train.batch_size, seed=config.data.seed)
    losses: list[jax.Array] = []
    row: Row = {"key": dtype, "model": config.model.name, "steps": STEPS}
    try:
        with jax.set_mesh(mesh):
            state = init_state(config, mesh)
            for step in range(STEPS):
                state, metrics = programs.train_step(state, shard_batch(next(batches), mesh))
                losses.append(metrics["loss"])
                if (step + 1) % _STEPS_PER_ROW == 0:
                    numbers = [float(loss) for loss in losses]
                    last = step + 1 == STEPS
                    yield row | {"losses": numbers} | ({} if last else {"partial": True})
    finally:
        batches.close()


def data_folder() -> pathlib.Path:
    """Return the folder of the prepared text: next to the compilation cache, for later suites."""
    options: Any = jax.config
    cache = options.jax_compilation_cache_dir
    return pathlib.Path(cache).parent / "suite_data" if cache else pathlib.Path("suite_data")


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Return the means [n - 19] of 20 consecutive losses each; empty for fewer than 20."""
    if len(losses) < _STEPS_PER_ROW:
        return np.zeros(0)
    return np.convolve(losses, np.ones(_STEPS_PER_ROW) / _STEPS_PER_ROW, "valid")


def largest_difference(rows: Sequence[Row]) -> float | None:
    """Return the largest difference between two rows' smoothed losses; None without two rows."""
    curves = [smoothed(np.array(row["losses"], float)) for row in rows if "losses" in row]
    steps = min(map(len, curves), default=0)
    if len(curves) < 2 or not steps:
        return None
    return float(np.max(np.abs(curves[0][:steps] - curves[1][:steps])))
