"""What the suite runs on a device: sizes, models, dtypes and compilation threads."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flowhn_jax.bench.attempt import Row
from flowhn_jax.compare.model_configs import NAMES, model_config
from flowhn_jax.config import Config
from kernels.backends import target_platform

Earlier = Mapping[str, Sequence[Row]]  # rows so far, by the name of their part

MODELS = NAMES  # FlowHN's strategies, then the baselines
_MAX_THREADS = 6


def sizes() -> tuple[str, ...]:
    """Return the models' sizes on this kind of device, the most valuable first."""
    return ("tiny",) if target_platform() == "cpu" else ("135m", "1b", "350m")


def recipe(size: str, model: str) -> Config:
    """Return the recipe of a strategy of FlowHN or of a baseline at one size."""
    return model_config(size, model)


def trained_at(config: Config, key: str, earlier: Earlier) -> Config:
    """Return a recipe with the batch size of its row in part `training`, if there is one."""
    rows = (row for row in earlier.get("training", ()) if row["key"] == key)
    batch = next(rows, {}).get("batch_size", config.train.batch_size)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))


def dtypes() -> tuple[str, ...]:
    """Return the compute dtypes to measure, the models' own first."""
    return ("float32",) if target_platform() == "cpu" else ("bfloat16", "float32")


def compile_threads() -> int:
    """Return the number of programs to compile at the same time: one per core, up to 6."""
    return min(_MAX_THREADS, len(os.sched_getaffinity(0)))


def compile_pool() -> ThreadPoolExecutor:
    """Return the thread pool in which programs are compiled before they are measured."""
    return ThreadPoolExecutor(compile_threads(), thread_name_prefix="compile")
